"""A model without its experts: everything else loaded as transformers loads it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from adapmoe_lab.models.checkpoint.meta_model import DTYPES, MetaModel
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.models.families import find_moe_layers


class UnusedTensorsWarning(UserWarning):
    """A checkpoint holds tensors that its model has no place for."""


def load_skeleton(
    folder: Path,
    model: MetaModel,
    weights: dict[str, torch.Tensor],
    generation: GenerationConfig | None,
) -> PreTrainedModel:
    """Load everything but the experts, on the CPU; experts modules hold empty parameters.

    Args:
        folder: the checkpoint's folder.
        model: the meta model of it, which says where the experts are.
        weights: the checkpoint's tensors outside the experts.
        generation: the settings of generation beside it.

    Raises:
        CheckpointError: the checkpoint lacks weights that the model needs.
    """
    dtype = DTYPES[model.dtype]
    with _built_without_experts({type(layer.experts) for layer in model.layers}), quiet():
        hf, report = type(model.hf).from_pretrained(
            None,
            config=model.config,
            dtype=dtype,
            state_dict=weights,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
        )
    hf.name_or_path = hf.config.name_or_path = str(folder)
    if generation is not None:
        hf.generation_config = generation
    for name, stored, made in sorted(report["mismatched_keys"]):
        raise CheckpointError(
            f"{folder} holds {name} as {tuple(stored)}, its configuration makes it {tuple(made)}; "
            "config.json and the files are of different models."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights that {model.config.model_type} needs, such as "
            f"{missing[0]}; download the checkpoint again."
        )
    own_parts = {name for name, _ in hf.named_children()}  # not towers beside a text model
    unused = sorted(n for n in report["unexpected_keys"] if n.partition(".")[0] in own_parts)
    if unused:
        warnings.warn(
            f"{folder} holds {len(unused)} tensors that {model.config.model_type} has no place "
            f"for, such as {unused[0]}; they are not used. If they should be, config.json is of "
            "another model.",
            UnusedTensorsWarning,
            stacklevel=3,
        )
    for layer, found in zip(model.layers, find_moe_layers(hf), strict=True):
        for name in layer.parameter_names:
            empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            setattr(found.experts, name, empty)
    _copy_out_of_files(hf)
    return hf.eval().requires_grad_(False)


def _copy_out_of_files(hf: PreTrainedModel) -> None:
    """Give weights memory of their own; transformers may leave them mapped from the files.

    A file that is then cut short or written to would end the process, or change the model.
    """
    for tensor in (*hf.parameters(), *hf.buffers()):
        tensor.data = tensor.data.clone()


@contextmanager
def _built_without_experts(classes: set[type[nn.Module]]) -> Iterator[None]:
    """Inside, modules of these classes are built without the parameters they hold per expert.

    Their checkpoint keys are then never read, and nothing is allocated for them. The classes'
    constructors are swapped only for as long as the context lasts.
    """
    original = {cls: cls.__init__ for cls in classes}
    for cls, init in original.items():
        cls.__init__ = _without_expert_parameters(init)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for cls, init in original.items():
            cls.__init__ = init  # pyright: ignore[reportAttributeAccessIssue]


def _without_expert_parameters(init: Callable[..., None]) -> Callable[..., None]:
    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        for name, _ in list(self.named_parameters(recurse=False)):
            del self._parameters[name]
        self._is_hf_initialized = True  # there is nothing left for transformers to initialise

    return build


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from listing every expert as unexpected, and from drawing bars."""
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
