"""The residual stream of a model: watched as it runs, and the norm each MoE layer reads it by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from adapmoe_lab.models.families import LAYER_NUMBER, MoELayer, UnsupportedModelError
from adapmoe_lab.models.hooks.experts_hook import served_by

PROBE_TOKENS = (1, 2, 3, 4)
"""Any few will do: they only show which module's output the experts are given."""


@contextmanager
def layer_outputs_observed_by(
    hf: PreTrainedModel,
    layers: Sequence[MoELayer],
    observer: Callable[[int, torch.Tensor], None],
) -> Iterator[None]:
    """Show an observer the residual stream [T, D] after every decoder layer with experts.

    It is told the number of the MoE layer. Batch and sequence are one axis.
    """

    def note(number: int, _: nn.Module, __: Any, output: Any) -> None:
        observer(number, _first(output).flatten(0, 1))

    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            handle = _decoder_layer(hf, layer).register_forward_hook(partial(note, number))
            hooks.callback(handle.remove)
        yield


@contextmanager
def token_ids_observed_by(
    hf: PreTrainedModel, observer: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    """Show an observer the token ids [B, T] of every forward pass that begins.

    A pass that is given embeddings instead is not shown.
    """

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None:
            observer(ids)

    handle = hf.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def last_hidden_observed_by(
    hf: PreTrainedModel, observer: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    """Show an observer the final hidden states [T, D] of every forward pass, as it ends.

    They are the model's last ones, which its output embeddings read. Batch and sequence are one
    axis.
    """

    def note(_: nn.Module, __: Any, output: Any) -> None:
        observer(_first(output).flatten(0, 1))

    handle = hf.base_model.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def find_input_norms(hf: PreTrainedModel, layers: Sequence[MoELayer]) -> list[nn.Module]:
    """Return for every attached MoE layer the norm whose output router and experts are given.

    Found by one forward pass of a few tokens, in which no expert is run.

    Raises:
        UnsupportedModelError: a layer's experts are given something else than a norm of the
            residual stream.
    """
    probe = _Probe()
    ids = torch.tensor([PROBE_TOKENS], device=hf.get_input_embeddings().weight.device)
    with ExitStack() as hooks:
        for layer in layers:
            for module in _decoder_layer(hf, layer).modules():
                hooks.callback(module.register_forward_hook(probe.note_call).remove)
        hooks.enter_context(layer_outputs_observed_by(hf, layers, probe.note_output))
        hooks.enter_context(served_by(layers, probe))
        hf(input_ids=ids, use_cache=False)
    for number, layer in enumerate(layers):
        if not probe.is_complete(number):
            raise UnsupportedModelError(
                f"The experts of {layer.path} are not given a norm of the residual stream, so "
                "what they will be given cannot be told from it; use another predictor, such as "
                "'next_router'."
            )
    return [probe.norms[number] for number in range(len(layers))]


class _Probe:
    """Serves experts that give nothing, and notes where their input comes from.

    Attributes:
        norms: by layer, the module that made the experts' input of something else.
        streams: by layer, the shape of the residual stream after it.
        inputs: by layer, the shape of the experts' input.
    """

    def __init__(self) -> None:
        self.norms: dict[int, nn.Module] = {}
        self.streams: dict[int, torch.Size] = {}
        self.inputs: dict[int, torch.Size] = {}
        self._calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

    def note_call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Remember what a module of one argument made of it."""
        if len(args) == 1 and all(isinstance(value, torch.Tensor) for value in (*args, output)):
            self._calls.append((module, args[0], output))

    def note_output(self, number: int, residual: torch.Tensor) -> None:
        """Remember how wide the residual stream is."""
        self.streams[number] = residual.shape

    def run_layer(
        self, layer: int, experts: nn.Module, hidden: torch.Tensor, *_: torch.Tensor
    ) -> torch.Tensor:
        """Find the last module called that made the experts' input of something else."""
        for module, before, after in self._calls:
            is_input = after.numel() == hidden.numel() and torch.equal(
                after.flatten(), hidden.flatten()
            )
            if is_input and before.shape == after.shape and not torch.equal(before, after):
                self.norms[layer] = module
        self._calls.clear()
        self.inputs[layer] = hidden.shape
        return torch.zeros_like(hidden)

    def is_complete(self, number: int) -> bool:
        """Whether a norm was found whose input may be the residual stream."""
        return number in self.norms and self.streams[number] == self.inputs[number]


def _decoder_layer(hf: PreTrainedModel, layer: MoELayer) -> nn.Module:
    match = LAYER_NUMBER.search(layer.path)
    if match is None:
        raise UnsupportedModelError(
            f"{layer.path} lies in no numbered layer, so the residual stream after it is unknown."
        )
    return hf.get_submodule(layer.path[: match.end(1)])


def _first(output: Any) -> torch.Tensor:
    """Return the hidden states of whatever a layer or model returns, which come first."""
    return output if isinstance(output, torch.Tensor) else output[0]
