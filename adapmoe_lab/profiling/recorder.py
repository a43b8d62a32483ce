"""Recording routing while a model runs, in whatever way it is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.loading import LabModel
from adapmoe_lab.engine.offload import LayerPass
from adapmoe_lab.models.families import router_scores
from adapmoe_lab.records import RoutingTrace

NEXT_ROUTER = "next_router"
MAX_DISTANCE = 3


@dataclass(eq=False)
class _Step:
    """One forward pass: its tokens and, layer by layer, what the routers said."""

    token_ids: NDArray[np.int64]
    starts_sequence: bool
    layers: list[tuple[NDArray, NDArray, NDArray]] = field(default_factory=list)
    predicted: dict[tuple[int, int], NDArray] = field(default_factory=dict)


class RoutingRecorder:
    """Collects the routing of every forward pass of one model while it is open.

    Also records what the routers of later layers say of each layer's input, the prediction
    AdapMoE prefetches by (arXiv 2408.10284, section 4.2). Batch 1 only, so that no padding is
    recorded.
    """

    def __init__(self, model: LabModel, max_distance: int = MAX_DISTANCE) -> None:
        """Prepare to record; `recording` does it."""
        self._model = model
        self._routers = [layer.router for layer in model.layers]
        self._max_distance = max_distance
        self._steps: list[_Step] = []
        self._skipping = model.engine.skipping

    @contextmanager
    def recording(self) -> Iterator[RoutingRecorder]:
        """Record every forward pass inside the block."""
        self._skipping = self._model.engine.skipping
        handle = self._model.hf.register_forward_pre_hook(self._begin_step, with_kwargs=True)
        try:
            with self._model.engine.observed_by(self._observe):
                yield self
        finally:
            handle.remove()
            complete = [s for s in self._steps if len(s.layers) == len(self._routers)]
            self._steps = complete

    def trace(self, labels: Sequence[str] | None = None) -> RoutingTrace:
        """Return what was recorded.

        Args:
            labels: one per sequence; numbered if None.
        """
        if not self._steps:
            raise ValueError("Nothing was recorded: run the model inside `recording()` first.")
        lengths = np.array([len(step.token_ids) for step in self._steps])
        offsets = np.cumsum(lengths) - lengths
        starts = [o for o, s in zip(offsets, self._steps, strict=True) if s.starts_sequence]
        decode_steps = [
            not step.starts_sequence and len(step.token_ids) == 1 for step in self._steps
        ]
        stacked = [
            np.concatenate([np.stack(parts, axis=1) for parts in per_step])
            for per_step in zip(*(self._by_quantity(s) for s in self._steps), strict=True)
        ]
        return RoutingTrace(
            spec=self._model.spec,
            token_ids=np.concatenate([step.token_ids for step in self._steps]),
            expert_indices=stacked[0],
            weights=stacked[1],
            router_probs=stacked[2],
            predictions={NEXT_ROUTER: self._predictions()},
            sequence_starts=starts,
            step_ids=np.repeat(np.arange(len(self._steps)), lengths),
            is_decode=np.repeat(decode_steps, lengths),
            labels=tuple(labels) if labels else tuple(f"text {i}" for i in range(len(starts))),
            recorded_under=self._skipping,
        )

    @staticmethod
    def _by_quantity(step: _Step) -> tuple[tuple[NDArray, ...], ...]:
        return tuple(zip(*step.layers, strict=True))

    def _predictions(self) -> dict[int, NDArray]:
        top_k, n_layers = self._model.spec.top_k, len(self._routers)
        predictions = {}
        for distance in range(1, self._max_distance + 1):
            parts = []
            for step in self._steps:
                none = np.full((len(step.token_ids), top_k), -1)
                by_layer = [step.predicted.get((i, distance), none) for i in range(n_layers)]
                parts.append(np.stack(by_layer, axis=1))
            predictions[distance] = np.concatenate(parts)
        return predictions

    def _begin_step(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        ids: torch.Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if ids.shape[0] != 1:
            raise ValueError(
                f"Routing is recorded one sequence at a time, got a batch of {ids.shape[0]}: "
                "padding is routed too and would be recorded as if it were text."
            )
        past = kwargs.get("past_key_values")
        is_first = past is None or past.get_seq_length() == 0
        self._steps.append(_Step(ids[0].cpu().numpy(), is_first))

    def _observe(self, layer_pass: LayerPass) -> None:
        step, layer, hidden = self._steps[-1], layer_pass.layer, layer_pass.hidden.detach()
        probabilities = router_scores(self._routers[layer], hidden)
        step.layers.append(
            (layer_pass.indices.copy(), layer_pass.weights, probabilities.cpu().numpy())
        )
        later = range(layer + 1, min(layer + self._max_distance + 1, len(self._routers)))
        for target in later:
            scores = router_scores(self._routers[target], hidden)
            likeliest = scores.topk(self._model.spec.top_k, dim=-1).indices
            step.predicted[target, target - layer] = likeliest.cpu().numpy()
