"""Where every tensor of a safetensors checkpoint lies, read from the headers of its files alone."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from adapmoe_lab.models.checkpoint.shard_file import (
    CheckpointError,
    ShardFile,
    TensorEntry,
    read_shard,
)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

CONFIG_NAME = "config.json"
ADAPTER_NAME = "adapter_config.json"
NAMED_FILE = "transformers_weights"
"""Where a configuration may name the file of its weights."""

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


def weight_files(folder: Path, names: Collection[str] = ()) -> tuple[str, ...]:
    """Return the names of the files a checkpoint's weights should be in, whether there or not.

    Args:
        folder: where its configuration and index lie.
        names: files that the checkpoint has beside those in the folder.

    Raises:
        CheckpointError: the folder's index cannot be understood.
    """
    main = _main_file(folder, names)
    return tuple(sorted(set(_weight_map(folder / main).values()))) if _is_index(main) else (main,)


def read_index(folder: Path) -> ShardIndex:
    """Read where the tensors of a checkpoint lie; costs one short read per file.

    The one place that decides which file a tensor comes from, as transformers decides it: a file
    that the configuration names, else a single file, else an index and all that the files it
    names hold. Files beside these are ignored.

    Raises:
        CheckpointError: there are no safetensors files, one is missing, cut short or damaged, the
            index disagrees with them, or two of them hold the same tensor. The text says which
            and what to do.
    """
    if (folder / ADAPTER_NAME).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER_NAME}), which would change the weights beside "
            "it; merge it into the model with peft's merge_and_unload and save that, or move "
            f"{ADAPTER_NAME} elsewhere to load the model without it."
        )
    main = _main_file(folder)
    if not (folder / main).is_file():
        raise CheckpointError(no_safetensors(str(folder), (path.name for path in folder.iterdir())))
    shards = tuple(read_shard(folder, name) for name in weight_files(folder))
    entries: dict[str, TensorEntry] = {}
    for entry in (entry for shard in shards for entry in shard.entries):
        if entry.name in entries:
            raise CheckpointError(
                f"{folder} holds the tensor {entry.name!r} twice, in {entries[entry.name].file} "
                f"and in {entry.file}, so that it is not known which is meant. Remove one of them "
                "(save the shard again without it), or download the checkpoint again."
            )
        entries[entry.name] = entry
    for name, file in (_weight_map(folder / main) if _is_index(main) else {}).items():
        if name not in entries or entries[name].file != file:
            raise CheckpointError(
                f"{folder / main} places the tensor {name!r} in {file}, which does not hold "
                "it; the index and the shards are of different checkpoints. Download or save the "
                "checkpoint again."
            )
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


def _main_file(folder: Path, names: Collection[str] = ()) -> str:
    """Return the name of the file that weights are read from or that says where they are."""
    named = _named_by_config(folder)
    if named is not None:
        _check_inside(folder / CONFIG_NAME, named, (".safetensors", ".safetensors.index.json"))
        return named
    has_single = SINGLE_NAME in names or (folder / SINGLE_NAME).is_file()
    return SINGLE_NAME if has_single or not (folder / INDEX_NAME).is_file() else INDEX_NAME


def _named_by_config(folder: Path) -> str | None:
    try:
        settings = json.loads((folder / CONFIG_NAME).read_bytes())
    except (OSError, ValueError):  # reading the configuration says what is wrong with it
        return None
    named = settings.get(NAMED_FILE) if isinstance(settings, dict) else None
    return None if named is None else str(named)


def _is_index(name: str) -> bool:
    return name.endswith(".json")


def _weight_map(path: Path) -> dict[str, str]:
    """Return which file an index places each tensor in."""
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
        _check_inside(path, file, (".safetensors",))
    return weight_map


def _check_inside(path: Path, file: str, suffixes: tuple[str, ...]) -> None:
    """Refuse the name of a file of weights that leads out of the checkpoint's folder."""
    parts = PurePosixPath(file).parts
    is_elsewhere = not parts or parts[0] == "/" or ".." in parts or "\\" in file or ":" in file
    if not file.endswith(suffixes) or is_elsewhere:
        raise CheckpointError(
            f"{path} places tensors in {file!r}; expected .safetensors files inside the "
            "checkpoint's folder. Do not use this checkpoint."
        )
