"""Tensors of safetensors files that are mapped into memory instead of read."""

from __future__ import annotations

from pathlib import Path

import torch

from adapmoe_lab.models.checkpoint.number_formats import TORCH_DTYPES
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError, TensorEntry


class MappedFiles:
    """Maps the files of a checkpoint, each once; what is written to them here stays here."""

    def __init__(self, folder: Path) -> None:
        """Map files of `folder` as they are asked for."""
        self._folder = folder
        self._contents: dict[str, torch.Tensor] = {}

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """Return a tensor as its file has it, valid as long as it is referred to.

        Raises:
            CheckpointError: its element type is none that torch has.
        """
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{entry.name} in {self._folder / entry.file} is stored as {entry.dtype}; tensors "
                f"can be read from {', '.join(TORCH_DTYPES)}."
            )
        content = self._content(entry.file)[entry.offset : entry.offset + entry.n_bytes]
        dtype = TORCH_DTYPES[entry.dtype]
        if entry.offset % dtype.itemsize:
            content = content.clone()  # a view of wider elements must start at a multiple of them
        return content.view(dtype).view(entry.shape)

    def _content(self, file: str) -> torch.Tensor:
        if file not in self._contents:
            path = self._folder / file
            mapped = torch.UntypedStorage.from_file(
                str(path), shared=False, nbytes=path.stat().st_size
            )
            self._contents[file] = torch.tensor([], dtype=torch.uint8).set_(mapped)
        return self._contents[file]
