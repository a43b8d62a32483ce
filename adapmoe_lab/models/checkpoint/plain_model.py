"""A checkpoint as transformers alone loads it, whole in memory, to compare with."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapmoe_lab.models.checkpoint.configuration import one_line, quantisation_found
from adapmoe_lab.models.checkpoint.shards import read_index
from adapmoe_lab.models.checkpoint.skeleton import quiet
from adapmoe_lab.models.support import UnsupportedModelError


def is_quantised(folder: Path) -> bool:
    """Whether a checkpoint's weights come quantised, by the headers of its files."""
    return quantisation_found(read_index(folder)) is not None


def load_unmodified(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return what transformers makes of a checkpoint, on the CPU; nothing else takes part.

    Raises:
        UnsupportedModelError: transformers cannot load it by itself.
    """
    try:
        with quiet():
            hf = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except Exception as error:  # whatever files that fit no model raise, by its class
        raise UnsupportedModelError(
            f"transformers cannot load the unmodified model: {one_line(error)}"
        ) from error
    return hf.eval().requires_grad_(False)
