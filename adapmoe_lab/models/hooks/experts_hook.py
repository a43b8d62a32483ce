"""The extension point: experts served from outside, through transformers' own registry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from adapmoe_lab.models.families import MoELayer, UnsupportedModelError

IMPLEMENTATION, TRACED = "adapmoe_lab", "adapmoe_lab_traced"
"""Names of what runs the experts: as it is always, and while a compiler looks on."""
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


def _dispatch(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    executor, layer = getattr(self, BINDING)
    return executor.run_layer(layer, self, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, torch.compiler.disable(_dispatch))
ALL_EXPERTS_FUNCTIONS.register(TRACED, _dispatch)


@contextmanager
def traced(hf: nn.Module) -> Iterator[None]:
    """Let a compiler see how the experts of a model are run, where it hides that else.

    What drives experts from the host is nothing to compile.
    """
    set_implementation = hf.set_experts_implementation  # pyright: ignore
    set_implementation(TRACED)
    try:
        yield
    finally:
        set_implementation(IMPLEMENTATION)


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


class _Guard:
    """Refuses, from within a model's hooks, what a model without its experts cannot do.

    That is to give its state dict, and so to be saved or uploaded; to run on another device than
    its experts; and to be copied or pickled, since whoever does that comes upon this object.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        """Guard a model that is where its experts are served."""
        self._model_type = hf.config.model_type  # not the model, which would then hold itself
        self._device = hf.device

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be copied or pickled."""
        self.refuse()

    def refuse(self, *_: Any) -> NoReturn:
        """Say why the model cannot be had as a whole, and how it can."""
        raise RuntimeError(
            f"The experts of this {self._model_type} model are served from outside: it holds none "
            "of their weights, and cannot be saved, copied or pickled as a whole. Call "
            "model.detach() first, which returns the plain transformers model with all its "
            "weights; those outside the experts are in named_parameters() as it is."
        )

    def check_device(self, hf: PreTrainedModel, *_: Any) -> None:
        """Refuse to run where the experts are not."""
        if hf.device != self._device:
            raise RuntimeError(
                f"The model was moved to {hf.device}, its experts are served on {self._device}. "
                f"Move it back, load it with device='{hf.device}', or call model.detach() first, "
                "which returns the plain transformers model."
            )


@contextmanager
def _guarded(hf: PreTrainedModel, layers: Sequence[MoELayer]) -> Iterator[None]:
    """Let a model refuse what it cannot do without its experts."""
    guard = _Guard(hf)
    with ExitStack() as hooks:
        hooks.callback(hf.register_forward_pre_hook(guard.check_device).remove)
        for layer in layers:
            handle = layer.experts.register_state_dict_pre_hook(guard.refuse)
            hooks.callback(handle.remove)
        yield


class ExpertsHook:
    """Routes a model's experts calls to an executor, and back.

    The experts modules of a model loaded without its experts keep no weights of their own;
    `give_weights` puts some in. Nothing else of the model is touched. While it is attached, what
    would take the model for a whole one is refused, see `_Guard`.
    """

    def __init__(self, hf: PreTrainedModel, layers: list[MoELayer]) -> None:
        """Bind to a model whose layers were found; nothing changes yet."""
        self.hf = hf
        self.layers = layers
        self._previous: str | None = None
        self._guarding = ExitStack()
        self.is_attached = False

    def attach(self, executor: ExpertsExecutor) -> None:
        """Send every experts call of the model to the executor.

        Raises:
            UnsupportedModelError: the model did not accept the setting for all its layers.
        """
        self._previous = self.hf.config._experts_implementation
        self._guarding.enter_context(_guarded(self.hf, self.layers))
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
        self._guarding.close()
        self.hf.set_experts_implementation(self._previous or "eager")
        for layer in self.layers:
            delattr(layer.experts, BINDING)
        self.is_attached = False

    def give_weights(self, number: int, weights: dict[str, torch.Tensor]) -> None:
        """Put one layer's fused expert tensors [E, ...] into the module."""
        for name, tensor in weights.items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            setattr(self.layers[number].experts, name, parameter)
