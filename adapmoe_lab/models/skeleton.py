"""A model without its experts: everything else loaded as transformers loads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from adapmoe_lab.models.families import MoELayer, find_moe_layers
from adapmoe_lab.models.shard_file import CheckpointError

DEQUANTISED = ("mxfp4", "fp8")
"""Quantised checkpoints that are read here; their other weights are dequantised."""


def load_skeleton(
    folder: Path, config: PreTrainedConfig, layers: list[MoELayer], dtype: torch.dtype
) -> PreTrainedModel:
    """Load everything but the experts, on the CPU; experts modules hold empty parameters.

    Args:
        folder: a checkpoint of safetensors files.
        config: its configuration.
        layers: the layers of the outline of the same model, which tell what experts are.
        dtype: the precision to compute in.

    Raises:
        CheckpointError: the checkpoint lacks weights that the model needs.
    """
    with _built_without_experts({type(layer.experts) for layer in layers}), _quiet():
        hf, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights that {config.model_type} needs, such as "
            f"{missing[0]}; download the checkpoint again."
        )
    for layer, found in zip(layers, find_moe_layers(hf), strict=True):
        for name in layer.parameter_names:
            empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            setattr(found.experts, name, empty)
    return hf.eval().requires_grad_(False)


def read_config(folder: Path) -> PreTrainedConfig:
    """Read a model's configuration; of quantised ones, ask for dequantised weights.

    Raises:
        ValueError: the checkpoint is quantised in a way that cannot be read here.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return config
    method = _quantisation_method(quantisation)
    if method not in DEQUANTISED:
        raise ValueError(
            f"{folder} is quantised with {method}, which cannot be served expert by expert; give "
            "the original checkpoint and quantise it while loading with expert_dtype='int4'. "
            f"Quantised checkpoints that load as they are: {', '.join(DEQUANTISED)}."
        )
    settings = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    config.quantization_config = {**settings, "dequantize": True}
    return config


def quantisation_of(config: PreTrainedConfig) -> str | None:
    """Return how a checkpoint's weights come quantised, or None."""
    quantisation = getattr(config, "quantization_config", None)
    return None if quantisation is None else _quantisation_method(quantisation)


def _quantisation_method(quantisation: Any) -> str:
    is_dict = isinstance(quantisation, dict)
    method = quantisation.get("quant_method") if is_dict else quantisation.quant_method
    return str(getattr(method, "value", method))


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
        for name in MoELayer("", self, self).parameter_names:
            del self._parameters[name]
        self._is_hf_initialized = True  # there is nothing left for transformers to initialise

    return build


@contextmanager
def _quiet() -> Iterator[None]:
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
