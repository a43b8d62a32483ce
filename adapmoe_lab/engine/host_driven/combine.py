"""The sum of the experts that one layer runs, and its gradient with experts still in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from adapmoe_lab.engine.host_driven.expert_sources import ExpertSource
from adapmoe_lab.engine.host_driven.surrogates import SurrogateOutputs
from adapmoe_lab.engine.layer_pass import LayerGradient
from adapmoe_lab.models.experts import run_expert

Positions = tuple[torch.Tensor, torch.Tensor] | tuple[slice, int]
"""Tokens and columns, int64 [n] each, of one expert's part in [T, K]; of one token, all of it and a
column, which index alike and need no copy to the device."""


@dataclass(frozen=True, eq=False)
class LayerRun:
    """The experts that one forward pass runs in one layer, and for which tokens.

    Attributes:
        layer: number of the MoE layer.
        module: the transformers experts module.
        indices: the router's choice, int64 [T, K].
        keep: bool [T, K], which of them are run.
        surrogates: what is computed in the place of an expert that is not run.
    """

    layer: int
    module: nn.Module
    indices: NDArray[np.int64]
    keep: NDArray[np.bool_]
    surrogates: SurrogateOutputs | None = None

    def outputs(
        self, source: ExpertSource, hidden: torch.Tensor
    ) -> Iterator[tuple[Positions, torch.Tensor]]:
        """Yield, expert by expert, where it was chosen and its outputs [n, D], not yet weighted."""
        positions = self._positions(hidden.device)
        for expert, weights in source.fetch_experts(self.layer, positions, hidden):
            at = positions[expert]
            yield at, run_expert(self.module, weights, hidden[at[0]])

    def _positions(self, device: torch.device) -> dict[int, Positions]:
        """Return where each expert was chosen, in the order of their numbers.

        All positions go to the device in one copy, those of an expert beside each other.
        """
        chosen = self.indices[self.keep]
        order = np.argsort(chosen, kind="stable")
        if len(self.keep) == 1:
            columns = np.flatnonzero(self.keep)[order].tolist()
            of_token = [(slice(0, 1), column) for column in columns]
            return dict(zip(chosen[order].tolist(), of_token, strict=True))
        positions = np.stack(np.nonzero(self.keep))  # [2, N]
        tokens, columns = torch.from_numpy(positions[:, order]).to(device)
        needed, starts = np.unique(chosen[order], return_index=True)
        ends = [*starts[1:].tolist(), len(chosen)]
        return {
            expert: (tokens[start:end], columns[start:end])
            for expert, start, end in zip(needed.tolist(), starts.tolist(), ends, strict=True)
        }

    def contributions(
        self, source: ExpertSource, hidden: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted expert outputs [T, K, D], zero where nothing is run."""
        parts = self.no_contributions(hidden, weights)
        for at, produced in self.outputs(source, hidden):
            parts[at] = produced * weights[at].unsqueeze(-1)
        return parts

    def surrogate_contributions(
        self, hidden: torch.Tensor, weights: torch.Tensor, nothing: torch.Tensor
    ) -> torch.Tensor | None:
        """Return what surrogates would give for each choice, weighted, float32 [T, K, D]."""
        if self.surrogates is None:
            return None
        routing = self.indices, weights.float().cpu().numpy()
        return self.surrogates.of_each_choice(self.layer, hidden, nothing, routing, self.keep)

    def no_contributions(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return zeros [T, K, D] in the precision that experts are summed in."""
        dtype = torch.promote_types(hidden.dtype, weights.dtype)
        shape = (*self.indices.shape, hidden.shape[-1])
        return torch.zeros(shape, dtype=dtype, device=hidden.device)


class StreamedCombine(torch.autograd.Function):
    """A layer's expert sum whose backward pass reads the experts from the store once more.

    Nothing of an expert is kept between the passes, so a layer never holds more than one expert
    beside its activations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        run: LayerRun,
        source: ExpertSource,
        source_again: ExpertSource,
        observers: tuple[Callable[[LayerGradient], None], ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum [T, D], and the contributions [T, K, D], which carry no gradient."""
        ctx.save_for_backward(hidden, weights)
        ctx.run, ctx.source, ctx.observers = run, source_again, observers
        parts = run.contributions(source, hidden, weights)
        ctx.mark_non_differentiable(parts)
        return parts.sum(dim=1), parts

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of hidden states and weights; show the layer to the observers."""
        with torch.autocast(gradient.device.type, enabled=False):  # as it is in `forward`
            return StreamedCombine._backward(ctx, gradient)

    @staticmethod
    def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        hidden, weights = ctx.saved_tensors
        run: LayerRun = ctx.run
        leaf = hidden.detach().requires_grad_()
        for_hidden, for_weights = torch.zeros_like(hidden), torch.zeros_like(weights)
        parts = run.no_contributions(hidden, weights) if ctx.observers else None
        with torch.enable_grad():
            for at, produced in run.outputs(ctx.source, leaf):
                arriving = gradient[at[0]]
                weighted = (arriving * weights[at].unsqueeze(-1)).to(produced.dtype)
                for_hidden += torch.autograd.grad(produced, leaf, weighted)[0]
                produced = produced.detach()
                for_weights[at] = (arriving * produced).sum(-1).to(weights.dtype)
                if parts is not None:
                    parts[at] = produced * weights[at].unsqueeze(-1)
        if parts is not None:
            found = LayerGradient(
                layer=run.layer,
                hidden=hidden.detach(),
                indices=run.indices,
                weights=weights,
                keep=run.keep,
                contributions=parts,
                gradient=gradient,
                surrogate_contributions=run.surrogate_contributions(
                    hidden.detach(), weights, torch.zeros_like(gradient)
                ),
            )
            for observer in ctx.observers:
                observer(found)
        return for_hidden, for_weights, None, None, None, None
