"""Checksums of experts: recorded when first seen, compared ever after."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from secrets import token_hex

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.records.files import cache_folder, written_atomically


def checksum(buffer: torch.Tensor) -> int:
    """Return the CRC-32 of a buffer of bytes on the host."""
    return zlib.crc32(memoryview(buffer.numpy()))


class ChecksumManifest:
    """Knows the checksum of every expert that was read before.

    An expert is compared once, when it is first read; one that was never seen is recorded.
    """

    def __init__(
        self, known: NDArray[np.int64], source: str, remedy: str = "Prepare the store again."
    ) -> None:
        """Start from checksums int64 [L, E], -1 where unknown; new ones are written into it.

        Args:
            known: an array in memory, or one mapped from a file so that records last.
            source: what an error calls the place the experts are read from.
            remedy: what an error says to do.
        """
        self._remedy = remedy
        self._known = known
        self._source = source
        self._is_checked = np.zeros(known.shape, dtype=bool)

    def check(self, layer: int, expert: int, buffer: torch.Tensor) -> None:
        """Compare an expert's bytes with the record, or record them.

        Raises:
            CheckpointError: they differ.
        """
        if self._is_checked[layer, expert]:
            return
        found, recorded = checksum(buffer), int(self._known[layer, expert])
        if recorded < 0:
            self._known[layer, expert] = found
        elif recorded != found:
            raise CheckpointError(
                f"Expert {expert} of MoE layer {layer} in {self._source} has the checksum "
                f"{found:08x}, recorded was {recorded:08x}: its file changed or is damaged. "
                f"{self._remedy}"
            )
        self._is_checked[layer, expert] = True


def kept_manifest(identity: str, shape: tuple[int, int], source: str) -> ChecksumManifest:
    """Return the manifest of a checkpoint that is kept in the user's cache folder.

    Where that cannot be written, what is recorded there still counts, and what is new is known
    for this run only.

    Args:
        identity: tells the files and the layout of the experts; another one has its own manifest.
        shape: L and E.
        source: what an error calls the checkpoint.
    """
    path = cache_folder() / "checksums" / f"{identity}.npy"
    try:
        if not path.exists():
            _begin(path, shape)
        known = _mapped(path, shape)
    except OSError:
        known = np.full(shape, -1, dtype=np.int64)
    remedy = f"Restore the file; if it was changed on purpose, delete {path}."
    return ChecksumManifest(known, source, remedy)


def _begin(path: Path, shape: tuple[int, int]) -> None:
    """Write a manifest that knows nothing, unless another process has just begun it.

    One that is already in use must not be replaced: what is then recorded in it would be lost.
    """
    fresh = path.with_name(f"{path.stem}.{os.getpid()}-{token_hex(4)}.new")
    try:
        with written_atomically(fresh) as file:
            np.save(file, np.full(shape, -1, dtype=np.int64))
        try:
            os.link(fresh, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _mapped(path: Path, shape: tuple[int, int]) -> NDArray[np.int64]:
    mode = "r+" if os.access(path, os.W_OK) else "c"  # which keeps what is written in memory
    try:
        known = np.load(path, mmap_mode=mode)
    except (ValueError, EOFError) as error:
        raise CheckpointError(_damaged(path, str(error))) from error
    if known.shape != shape or known.dtype != np.int64:
        raise CheckpointError(_damaged(path, f"{known.dtype} {list(known.shape)}"))
    return known


def _damaged(path: Path, found: str) -> str:
    return (
        f"{path}, which keeps the checksums of experts read before, is damaged ({found}); delete "
        "it, and they are recorded anew."
    )
