"""Watching a transformers model run: a callback at each point of its forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from adapmoe_lab.models.families import LAYER_NUMBER, MoELayer, UnsupportedModelError
from adapmoe_lab.models.hooks.key_value_cache import cache_given
from adapmoe_lab.records.hook_points import HookPoint

Callback = Callable[..., None]
"""What is called at a hook point; `engine.observing.observing` says with what."""

OF_EXPERTS = (HookPoint.EXPERTS_OUTPUT, HookPoint.EXPERTS_GRADIENT)
"""Points that only what runs the experts knows."""


@contextmanager
def observing_model(
    hf: PreTrainedModel, layers: Sequence[MoELayer], callbacks: Mapping[HookPoint, Callback]
) -> Iterator[None]:
    """Call back at points of every forward pass inside the block; restore the model afterwards.

    For `engine.observing.observing`, which says what callbacks are given, and for what lies below
    it. The points `OF_EXPERTS` are not among those of a model.

    Args:
        hf: the model.
        layers: its layers with routed experts.
        callbacks: what is called, by hook point.

    Raises:
        UnsupportedModelError: outputs are to be observed of a layer that has no number.
    """
    with ExitStack() as hooks:
        for point, callback in callbacks.items():
            for handle in _REGISTERS[point](hf, layers, callback):
                hooks.callback(handle.remove)
        yield


def hooks_of(hf: nn.Module) -> tuple[int, ...]:
    """Return the numbers of a model's forward hooks: others once one is added or removed.

    Those of `observing_model` are left out.
    """
    kinds = [(module._forward_pre_hooks, module._forward_hooks) for module in hf.modules()]
    found = [hook for hooks in kinds for kind in hooks for hook in kind.items()]
    return tuple(number for number, hook in found if not _is_own(hook))


def _is_own(hook: Callable[..., Any]) -> bool:
    function = hook.func if isinstance(hook, partial) else hook
    return getattr(function, "__module__", None) == __name__


def decoder_layer(hf: PreTrainedModel, layer: MoELayer) -> nn.Module:
    """Return the decoder layer in which a layer's experts lie.

    Raises:
        UnsupportedModelError: it has no number by which to know it.
    """
    match = LAYER_NUMBER.search(layer.path)
    if match is None:
        raise UnsupportedModelError(
            f"{layer.path} lies in no numbered layer, so the residual stream after it is unknown."
        )
    return hf.get_submodule(layer.path[: match.end(1)])


def _at_token(
    hf: PreTrainedModel, _: Sequence[MoELayer], callback: Callback
) -> Iterator[RemovableHandle]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None:
            callback(ids, cache_given(kwargs))

    yield hf.register_forward_pre_hook(note, with_kwargs=True)


def _at_experts_input(
    _: PreTrainedModel, layers: Sequence[MoELayer], callback: Callback
) -> Iterator[RemovableHandle]:
    def note(number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        callback(number, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    for number, layer in enumerate(layers):
        yield layer.experts.register_forward_pre_hook(partial(note, number), with_kwargs=True)


def _at_layer_output(
    hf: PreTrainedModel, layers: Sequence[MoELayer], callback: Callback
) -> Iterator[RemovableHandle]:
    def note(number: int, _: nn.Module, __: Any, output: Any) -> None:
        callback(number, _first(output).flatten(0, 1))

    for number, layer in enumerate(layers):
        yield decoder_layer(hf, layer).register_forward_hook(partial(note, number))


def _at_last_hidden(
    hf: PreTrainedModel, _: Sequence[MoELayer], callback: Callback
) -> Iterator[RemovableHandle]:
    def note(_: nn.Module, __: Any, output: Any) -> None:
        callback(_first(output).flatten(0, 1))

    yield hf.base_model.register_forward_hook(note)


_REGISTERS = {
    HookPoint.TOKEN: _at_token,
    HookPoint.EXPERTS_INPUT: _at_experts_input,
    HookPoint.LAYER_OUTPUT: _at_layer_output,
    HookPoint.LAST_HIDDEN: _at_last_hidden,
}


def _first(output: Any) -> torch.Tensor:
    """Return the hidden states of whatever a layer or model returns, which come first."""
    return output if isinstance(output, torch.Tensor) else output[0]
