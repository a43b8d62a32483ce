"""The norm by which each layer with experts reads the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from adapmoe_lab.models.families import MoELayer, UnsupportedModelError
from adapmoe_lab.models.hooks.experts_hook import served_by
from adapmoe_lab.models.hooks.observing import decoder_layer, observing_model
from adapmoe_lab.records.hook_points import HookPoint

PROBE_TOKENS = (1, 2, 3, 4)
"""Any few will do: they only show which module's output the experts are given."""


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
            for module in decoder_layer(hf, layer).modules():
                hooks.callback(module.register_forward_hook(probe.note_call).remove)
        outputs = {HookPoint.LAYER_OUTPUT: probe.note_output}
        hooks.enter_context(observing_model(hf, layers, outputs))
        hooks.enter_context(served_by(layers, probe))
        hf(input_ids=ids, use_cache=False)
    for number, layer in enumerate(layers):
        if not probe.is_complete(number):
            raise UnsupportedModelError(
                f"The experts of {layer.path} are not given a norm of the residual stream, so "
                "what they will be given does not follow from it; use another predictor, such as "
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
