"""A model without its experts: everything else loaded as transformers loads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from adapmoe_lab.models.families import find_moe_layers
from adapmoe_lab.models.outline import DTYPES, ModelOutline
from adapmoe_lab.models.shard_file import CheckpointError
from adapmoe_lab.models.support import UnsupportedModelError, supported

DEQUANTISED = ("mxfp4", "fp8")
"""Quantised checkpoints that can be read here."""


def load_skeleton(
    folder: Path, model: ModelOutline, weights: dict[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """Load everything but the experts, on the CPU; experts modules hold empty parameters.

    Args:
        folder: a checkpoint of safetensors files.
        model: the outline of the model in it, which tells what experts are.
        weights: the checkpoint's tensors outside the experts, if not as they lie in its files.

    Raises:
        CheckpointError: the checkpoint lacks weights that the model needs.
    """
    dtype = DTYPES[model.dtype]
    with _built_without_experts({type(layer.experts) for layer in model.layers}), _quiet():
        hf, report = type(model.hf).from_pretrained(
            folder if weights is None else None,
            config=model.config,
            dtype=dtype,
            state_dict=weights,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
        )
    if weights is not None and (folder / "generation_config.json").is_file():
        hf.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
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
    for layer, found in zip(model.layers, find_moe_layers(hf), strict=True):
        for name in layer.parameter_names:
            empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            setattr(found.experts, name, empty)
    _copy_out_of_files(hf)
    return hf.eval().requires_grad_(False)


def read_config(folder: Path) -> tuple[PreTrainedConfig, str | None]:
    """Read a model's configuration, and how its weights come quantised, such as `mxfp4`.

    Quantised weights are dequantised here as they are read, so the configuration returned no
    longer asks transformers to do so.

    Raises:
        UnsupportedModelError: transformers does not know the architecture.
        ValueError: the checkpoint is quantised in a way that cannot be read here.
    """
    _check_architecture(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return config, None
    method = _quantisation_method(quantisation)
    if method not in DEQUANTISED:
        raise ValueError(
            f"{folder} is quantised with {method}, which cannot be served expert by expert; give "
            "the original checkpoint and quantise it while loading with expert_dtype='int4'. "
            f"Quantised checkpoints that load as they are: {', '.join(DEQUANTISED)}."
        )
    del config.quantization_config
    return config, method


def _copy_out_of_files(hf: PreTrainedModel) -> None:
    """Give weights memory of their own; transformers may leave them mapped from the files.

    A file that is then cut short or written to would end the process, or change the model.
    """
    for tensor in (*hf.parameters(), *hf.buffers()):
        tensor.data = tensor.data.clone()


def _check_architecture(folder: Path) -> None:
    settings, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
    model_type = settings.get("model_type")
    if model_type in CONFIG_MAPPING:
        return
    if "auto_map" in settings:
        raise UnsupportedModelError(
            f"{folder} is a {model_type} model that comes with code of its own, which is never "
            f"run here. Give a model that transformers itself knows. {supported()}"
        )
    raise UnsupportedModelError(
        f"{folder} is a {model_type} model, which transformers {transformers.__version__} does "
        f"not know; a newer one may. {supported()}"
    )


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
        for name, _ in list(self.named_parameters(recurse=False)):
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
