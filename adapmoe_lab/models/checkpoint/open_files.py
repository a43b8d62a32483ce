"""The files of a checkpoint, opened as they are needed and read piece by piece."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import BinaryIO

import torch

from adapmoe_lab.models.checkpoint.shard_file import CheckpointError, TensorEntry


class OpenFiles:
    """Keeps files open until `close`, or until it is dropped; safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        """Read files of `folder`; none is opened yet."""
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._lock = threading.Lock()
        self.close = weakref.finalize(self, _close_all, self._files)

    def read_into(self, entry: TensorEntry, offset: int, out: torch.Tensor) -> None:
        """Fill `out` uint8 [n] from an offset in the file of a tensor.

        Raises:
            CheckpointError: the file ends before that.
        """
        n_bytes = out.numel()
        with self._lock:
            if entry.file not in self._files:
                self._files[entry.file] = (self._folder / entry.file).open("rb", buffering=0)
            file = self._files[entry.file]
            file.seek(offset)
            n_read = _read_all(file, memoryview(out.numpy()))
        if n_read != n_bytes:
            raise CheckpointError(
                f"{entry.file} ended after {n_read} of the {n_bytes} bytes of {entry.name}: it "
                "was cut short while in use; restore it and load again."
            )


def _close_all(files: dict[str, BinaryIO]) -> None:
    while files:
        files.popitem()[1].close()


def _read_all(file: BinaryIO, target: memoryview) -> int:
    """Fill a buffer from an unbuffered file, which may hand out less than asked for at a time."""
    n_read = 0
    while n_read < len(target):
        n_more = file.readinto(target[n_read:])  # pyright: ignore[reportAttributeAccessIssue]
        if not n_more:
            break
        n_read += n_more
    return n_read
