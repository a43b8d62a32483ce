"""Where every tensor of a safetensors checkpoint lies, read from the headers of its files alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from adapmoe_lab.models.shard_file import CheckpointError, ShardFile, TensorEntry, read_shard
from adapmoe_lab.records.files import digest

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
"""Files of these names may run any code when they are opened."""


@dataclass(frozen=True)
class ShardIndex:
    """Every tensor of a checkpoint, and the files as they were when this was read.

    Attributes:
        folder: the checkpoint's folder.
        files: its safetensors files, sorted by name.
        entries: the tensors by name.
    """

    folder: Path
    files: tuple[ShardFile, ...]
    entries: Mapping[str, TensorEntry] = field(repr=False)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self.entries))

    @property
    def fingerprint(self) -> str:
        """Identifies the checkpoint by the names, sizes and headers of its files."""
        return digest(
            *(
                part
                for file in self.files
                for part in (file.name, str(file.n_bytes), file.header_digest)
            )
        )

    def entry(self, name: str) -> TensorEntry:
        """Return where a tensor lies.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        if name not in self.entries:
            raise CheckpointError(
                f"{self.folder} holds no tensor {name!r} among its {len(self.entries)}; its names "
                f"start with {', '.join(map(repr, self.names[:3]))}. It may be the "
                "checkpoint of another architecture."
            )
        return self.entries[name]

    def check_unchanged(self) -> None:
        """Refuse a checkpoint of which a file was written since it was read.

        Raises:
            CheckpointError: a file is gone, or its size, time of writing or header differs.
        """
        for file in self.files:
            path = self.folder / file.name
            if not path.is_file():
                raise CheckpointError(
                    f"{path} was there when the checkpoint was read and is gone; restore it, or "
                    "load the checkpoint again."
                )
            if not file.is_unchanged(self.folder):
                raise CheckpointError(
                    f"{path} has changed since the checkpoint was read; load the checkpoint again "
                    "so that its tensors are looked up anew."
                )


def weight_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files a checkpoint's weights should be in, whether there or not.

    Raises:
        CheckpointError: the folder's index cannot be understood.
    """
    return _files_of(_weight_map(folder))


def read_index(folder: Path) -> ShardIndex:
    """Read where the tensors of a checkpoint lie; costs one short read per file.

    Where there is an index, the checkpoint's tensors are those it names.

    Raises:
        CheckpointError: there are no safetensors files, one is missing, cut short or damaged, or
            the index disagrees with them. The text says which and what to do.
    """
    weight_map = _weight_map(folder)
    if weight_map is None and not (folder / SINGLE_NAME).is_file():
        raise CheckpointError(no_safetensors(str(folder), (path.name for path in folder.iterdir())))
    shards = tuple(read_shard(folder, name) for name in _files_of(weight_map))
    by_file = {shard.name: {entry.name: entry for entry in shard.entries} for shard in shards}
    if weight_map is None:
        return ShardIndex(folder, shards, MappingProxyType(by_file[SINGLE_NAME]))
    for name, file in weight_map.items():
        if name not in by_file[file]:
            raise CheckpointError(
                f"{folder / INDEX_NAME} places the tensor {name!r} in {file}, which does not hold "
                "it; the index and the shards are of different checkpoints. Download or save the "
                "checkpoint again."
            )
    entries = {name: by_file[file][name] for name, file in weight_map.items()}
    return ShardIndex(folder, shards, MappingProxyType(entries))


def no_safetensors(place: str, names: Iterable[str]) -> str:
    """Return the text for a place whose file names include no readable safetensors checkpoint."""
    names = sorted(names)
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    ggufs = [name for name in names if name.endswith(".gguf")]
    others = [name for name in names if name.endswith(".safetensors")]
    text = f"{place} holds no {SINGLE_NAME} and no {INDEX_NAME}, the weights that are read here."
    if others:
        text += f" {_listed(others)} has another layout; give the checkpoint in transformers' own."
    if pickles:
        text += (
            f" {_listed(pickles)} is a pickle, which is never read, because opening it may run any "
            "code. Convert it where you trust it: load it with transformers and call "
            "save_pretrained, which writes safetensors."
        )
    if ggufs:
        text += (
            f" {_listed(ggufs)} is GGUF, which is not read; use the original safetensors "
            'checkpoint and quantise it with expert_dtype="int4".'
        )
    return text


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (one of {len(names)} such files)"


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Return which file the index places each tensor in; None where there is no index."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(
            f"{path} is no JSON ({error}); download or save the checkpoint again."
        ) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path} has no weight_map, the object that gives every tensor's file; download or "
            "save the checkpoint again."
        )
    if not isinstance(index.get("metadata"), dict):
        raise CheckpointError(
            f"{path} has no metadata, an object that transformers asks for; add "
            '"metadata": {} to it, or save the checkpoint again.'
        )
    for file in {str(file) for file in weight_map.values()}:
        parts = PurePosixPath(file).parts
        is_elsewhere = parts[0] == "/" or ".." in parts or "\\" in file or ":" in file
        if not file.endswith(".safetensors") or is_elsewhere:
            raise CheckpointError(
                f"{path} places tensors in {file!r}; expected .safetensors files inside the "
                "checkpoint's folder. Do not use this checkpoint."
            )
    return weight_map


def _files_of(weight_map: Mapping[str, str] | None) -> tuple[str, ...]:
    return (SINGLE_NAME,) if weight_map is None else tuple(sorted(set(weight_map.values())))
