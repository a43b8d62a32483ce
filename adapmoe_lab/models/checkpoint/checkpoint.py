"""A checkpoint on disk: what it holds, looked at without loading more than is asked for."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from adapmoe_lab.models.checkpoint.configuration import (
    QuantisationClaim,
    check_against_files,
    one_line,
    quantisation_found,
    read_config,
    read_generation_config,
    settings_digest,
)
from adapmoe_lab.models.checkpoint.expert_reader import ExpertReader
from adapmoe_lab.models.checkpoint.hub import config_folder, local_folder
from adapmoe_lab.models.checkpoint.identity import weights_identity
from adapmoe_lab.models.checkpoint.meta_model import DTYPES, MetaModel, meta_model_of
from adapmoe_lab.models.checkpoint.number_formats import TORCH_DTYPES
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.models.checkpoint.shards import ShardIndex, read_index, weight_files
from adapmoe_lab.models.checkpoint.skeleton import load_skeleton
from adapmoe_lab.models.checkpoint.tokenizer import read_tokenizer
from adapmoe_lab.models.families import MoELayer
from adapmoe_lab.models.support import check_family
from adapmoe_lab.records.files import digest
from adapmoe_lab.records.precision import SHORT_NAMES

HFModel = PreTrainedModel
"""The type of a transformers model, for annotations on the floors above."""

N_PROBES = 8
"""Tokens whose routing tells whether a router normalises."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model folder whose headers were read, and nothing else.

    Attributes:
        folder: where it lies.
        index: where every tensor lies in its files.
        model: the meta model of the model it makes.
        fp8_blocks: rows and columns that share a scale in float8, if the configuration says so.
        generation: the settings of generation that lie beside it.
    """

    folder: Path
    index: ShardIndex
    model: MetaModel
    fp8_blocks: tuple[int, int] | None = None
    generation: GenerationConfig | None = None

    def reader(self) -> ExpertReader:
        """Return what reads experts out of the files."""
        return ExpertReader(self.index, self.model.hf, self.model.layers, self.fp8_blocks)

    def load_skeleton(self) -> PreTrainedModel:
        """Load everything but the experts, on the CPU, out of the files that experts come from."""
        with closing(self.reader()) as reader:
            weights = reader.other_tensors(DTYPES[self.model.dtype])
        return load_skeleton(self.folder, self.model, weights, self.generation)

    def load_tokenizer(self) -> Any:
        """Load the tokenizer that lies beside the weights; no code that comes with it is run.

        Raises:
            CheckpointError: there is none, or none that works.
        """
        return read_tokenizer(self.folder)

    def identity(self) -> str:
        """Return what tells the model from all others: its weights, and what is made of them.

        The first time, all files are read.
        """
        return f"model:{digest(weights_identity(self.index), settings_digest(self.folder))}"


def open_checkpoint(
    name: str | Path, dtype: str = "auto", revision: str | None = None
) -> Checkpoint:
    """Find a model and read its configuration and the headers of its files, but no weight.

    Args:
        name: `"demo"`, a folder or a hub id, which is downloaded unless it is cached.
        dtype: `"auto"` for the checkpoint's own, or a name in `DTYPES`.
        revision: branch, tag or commit of a hub id.

    Raises:
        ValueError: the dtype name is unknown, or the files are not what they should be.
        FileNotFoundError: there is no such folder, or the hub does not have it.
        UnsupportedModelError: the model has no experts that can be served.
    """
    dtype = _known_dtype(dtype)
    config, claim = read_config(config_folder(name, revision))
    check_family(config.model_type)
    return _checkpoint_of(name, local_folder(name, revision), config, claim, dtype)


def look_at_model(name: str | Path, dtype: str = "auto", revision: str | None = None) -> MetaModel:
    """Return a model's meta model from its configuration; of a hub model no weight is downloaded.

    Where the files are there, what their headers say holds, as it does for `open_checkpoint`.

    Raises: as `open_checkpoint`.
    """
    dtype = _known_dtype(dtype)
    folder = config_folder(name, revision)
    config, claim = read_config(folder)
    check_family(config.model_type)
    if all((folder / file).is_file() for file in weight_files(folder)):
        return _checkpoint_of(name, folder, config, claim, dtype).model
    if dtype == "auto":
        dtype = _named_dtype(config) or "bfloat16"
    return meta_model_of(str(name), config, dtype, claim.method if claim is not None else None)


def partial_identity(hf: PreTrainedModel) -> str:
    """Return what versions up to 0.1 told weights apart by, to recognise what they saved.

    All vectors and router-sized matrices, rounded to bfloat16: another model that shares them, such
    as one whose experts were edited, has the same.
    """
    sha = hashlib.sha256()
    for name, parameter in sorted(hf.named_parameters()):
        is_small = parameter.dim() < 2 or (min(parameter.shape) <= 256 and parameter.dim() == 2)
        if is_small and parameter.numel():
            values = parameter.detach().to("cpu", torch.bfloat16).contiguous()
            sha.update(name.encode())
            sha.update(values.view(torch.uint8).numpy().tobytes())
    return f"weights:{sha.hexdigest()[:24]}"


class _RoutedError(Exception):
    """Carries the router's weights out of a forward pass that need not go on."""


@torch.no_grad()
def routed_weights(hf: PreTrainedModel, layers: list[MoELayer]) -> torch.Tensor:
    """Return the router weights [T, K] that the first layer's experts receive for a few tokens.

    The forward pass ends there: no expert is needed.

    Raises:
        CheckpointError: the model cannot run.
    """

    def receive(_: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        raise _RoutedError(kwargs["top_k_weights"] if "top_k_weights" in kwargs else args[2])

    ids = torch.arange(N_PROBES, device=hf.device)[None]
    handle = layers[0].experts.register_forward_pre_hook(receive, with_kwargs=True)
    try:
        hf(ids, use_cache=False)
    except _RoutedError as seen:
        return seen.args[0]
    except Exception as error:  # whatever a configuration raises that fits no forward pass
        raise CheckpointError(
            f"transformers cannot run the {hf.config.model_type} model that config.json of "
            f"{hf.name_or_path} describes: {one_line(error)} Correct config.json, or download the "
            "model again."
        ) from error
    finally:
        handle.remove()
    raise CheckpointError(f"No token reached the experts of {layers[0].path}.")


def _checkpoint_of(
    name: str | Path,
    folder: Path,
    config: PreTrainedConfig,
    claim: QuantisationClaim | None,
    dtype: str,
) -> Checkpoint:
    """Return the checkpoint in a folder whose configuration was read."""
    index, generation = read_index(folder), read_generation_config(folder)
    is_own, found = dtype == "auto", quantisation_found(index)
    check_against_files(claim, _named_dtype(config) if is_own else None, index)
    if is_own:
        dtype = _own_dtype(config, index)
    blocks = claim.fp8_blocks if claim is not None else None
    model = meta_model_of(str(name), config, dtype, found)
    return Checkpoint(folder, index, model, blocks, generation)


def _known_dtype(name: str) -> str:
    name = SHORT_NAMES.get(name, name)
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"dtype={name!r} is unknown; expected 'auto', {', '.join(DTYPES)}.")
    return name


def _own_dtype(config: PreTrainedConfig, index: ShardIndex) -> str:
    """Return the precision a checkpoint says it is in, or else that of its first plain weight."""
    named = _named_dtype(config)
    if named is not None:
        return named
    for name in index.names:
        stored = TORCH_DTYPES.get(index.entry(name).dtype)
        for dtype_name, dtype in DTYPES.items():
            if stored == dtype:
                return dtype_name
    return "bfloat16"


def _named_dtype(config: PreTrainedConfig) -> str | None:
    name = str(config.dtype).removeprefix("torch.")
    return name if name in DTYPES else None
