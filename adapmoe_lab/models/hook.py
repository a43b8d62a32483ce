"""The seam: experts served from outside, through transformers' own registry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from adapmoe_lab.models.families import MoELayer, UnsupportedModelError

IMPLEMENTATION = "adapmoe_lab"
BINDING = "_adapmoe_lab_binding"


class ExpertsExecutor(Protocol):
    """Runs the routed experts of a layer."""

    def run_layer(
        self,
        layer: int,
        experts: nn.Module,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return the summed expert outputs [T, D] of hidden states [T, D].

        `top_k_index` [T, K] may hold E, transformers' mark for "no expert".
        """
        ...


@torch.compiler.disable
def _dispatch(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    executor, layer = getattr(self, BINDING)
    return executor.run_layer(layer, self, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _dispatch)


@contextmanager
def served_by(layers: Sequence[MoELayer], executor: ExpertsExecutor) -> Iterator[None]:
    """Send the experts calls of a model's attached layers to another executor for a while."""
    before = [getattr(layer.experts, BINDING) for layer in layers]
    try:
        for number, layer in enumerate(layers):
            setattr(layer.experts, BINDING, (executor, number))
        yield
    finally:
        for layer, binding in zip(layers, before, strict=True):
            setattr(layer.experts, BINDING, binding)


class ExpertsHook:
    """Routes a model's experts calls to an executor, and back.

    The experts modules of a model loaded without its experts keep no weights of their own;
    `give_weights` puts some in. Nothing else of the model is touched.
    """

    def __init__(self, hf: PreTrainedModel, layers: list[MoELayer]) -> None:
        """Bind to a model whose layers were found; nothing changes yet."""
        self.hf = hf
        self.layers = layers
        self._previous: str | None = None
        self.is_attached = False

    def attach(self, executor: ExpertsExecutor) -> None:
        """Send every experts call of the model to the executor.

        Raises:
            UnsupportedModelError: the model did not accept the setting for all its layers.
        """
        self._previous = self.hf.config._experts_implementation
        for number, layer in enumerate(self.layers):
            setattr(layer.experts, BINDING, (executor, number))
        self.hf.set_experts_implementation(IMPLEMENTATION)
        reached = sum(
            layer.experts.config._experts_implementation == IMPLEMENTATION  # pyright: ignore
            for layer in self.layers
        )
        self.is_attached = True
        if reached != len(self.layers):
            self.detach()
            raise UnsupportedModelError(
                f"{self.hf.config.model_type} accepted the experts function in {reached} of "
                f"{len(self.layers)} layers; its experts cannot be served from outside."
            )

    def detach(self) -> None:
        """Restore the experts function the model had before."""
        if not self.is_attached:
            return
        self.hf.set_experts_implementation(self._previous or "eager")
        for layer in self.layers:
            delattr(layer.experts, BINDING)
        self.is_attached = False

    def give_weights(self, number: int, weights: dict[str, torch.Tensor]) -> None:
        """Put one layer's fused expert tensors [E, ...] into the module."""
        for name, tensor in weights.items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            setattr(self.layers[number].experts, name, parameter)
