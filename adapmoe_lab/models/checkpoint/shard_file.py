"""One safetensors file: what its header says of its tensors, checked against the file's size.

A safetensors file is 8 bytes that give the length of a JSON header, the header, and the data:
https://github.com/huggingface/safetensors#format. Data is never read here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from adapmoe_lab.records.files import digest

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The longest header the safetensors library writes or reads."""

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64", "C64"), 64)
)
"""Bits of one element, by the dtype's safetensors name."""


class CheckpointError(ValueError):
    """The files of a checkpoint are not what they should be."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor's data lies.

    Attributes:
        name: the tensor's name in the checkpoint.
        file: name of its file, relative to the checkpoint's folder.
        dtype: safetensors name of the element type, such as `BF16` or `F8_E4M3`.
        shape: axes as stored.
        offset: bytes from the start of the file.
        n_bytes: bytes of the data.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class ShardFile:
    """One file of a checkpoint as it was when its header was read.

    Attributes:
        name: relative to the checkpoint's folder.
        n_bytes: size of the file.
        mtime_ns: when it was last written.
        header_digest: identifies the header's bytes.
        entries: its tensors in the order of their data.
    """

    name: str
    n_bytes: int
    mtime_ns: int
    header_digest: str
    entries: tuple[TensorEntry, ...] = field(repr=False)

    def is_unchanged(self, folder: Path) -> bool:
        """Tell whether the file still has this size, time of writing and header."""
        path = folder / self.name
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) != (self.n_bytes, self.mtime_ns):
            return False
        return digest(_read_header(path)) == self.header_digest


def read_shard(folder: Path, name: str) -> ShardFile:
    """Read the header of one file of a checkpoint.

    Raises:
        CheckpointError: the file is missing, cut short or damaged; the text says what to do.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(
            f"{name} is missing in {folder}, though the index names it; download the checkpoint "
            "again or copy the file there."
        )
    header = _read_header(path)
    status = path.stat()
    try:
        described = json.loads(header)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a safetensors file: its header is no JSON ({error})."
        ) from error
    if not isinstance(described, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is no JSON object.")
    data_start = LENGTH_BYTES + len(header)
    unsorted = _entries(path, name, described, data_start)
    entries = tuple(sorted(unsorted, key=lambda entry: (entry.offset, entry.n_bytes)))
    _check_extent(path, entries, data_start, status.st_size)
    return ShardFile(name, status.st_size, status.st_mtime_ns, digest(header), entries)


def _read_header(path: Path) -> bytes:
    n_file_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES)
        n_bytes = int.from_bytes(start, "little")
        fits = n_bytes <= min(MAX_HEADER_BYTES, n_file_bytes - LENGTH_BYTES)
        if len(start) == LENGTH_BYTES and n_bytes > 0 and fits:
            return file.read(n_bytes)
    if start == b"version ":
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not a safetensors file; run `git lfs pull` in its "
            "folder, or download the checkpoint from the hub."
        )
    raise CheckpointError(
        f"{path} is not a safetensors file, or is cut short within its header: its first bytes "
        f"announce a header of {n_bytes} bytes, the file has {n_file_bytes}. Download it again."
    )


def _entries(
    path: Path, file: str, described: Mapping[str, Any], data_start: int
) -> Iterator[TensorEntry]:
    for name, tensor in described.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = tensor["dtype"], tuple(tensor["shape"])
            begin, end = tensor["data_offsets"]
            if any(type(number) is not int for number in (begin, end, *shape)):
                raise TypeError("offsets and axes are whole numbers")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged: its header describes the tensor {name!r} as {tensor!r}; "
                "expected dtype, shape and data_offsets. Download it again."
            ) from error
        if not 0 <= begin <= end:
            raise CheckpointError(
                f"{path} is damaged: the tensor {name!r} has data offsets {begin} to {end}, which "
                "are out of range. Download it again."
            )
        needed = -(-prod(shape) * DTYPE_BITS[dtype] // 8) if dtype in DTYPE_BITS else end - begin
        if needed != end - begin:
            raise CheckpointError(
                f"{path} is damaged: the tensor {name!r} of {dtype} {list(shape)} needs {needed} "
                f"bytes, its data offsets give {end - begin}. Download it again."
            )
        yield TensorEntry(name, file, dtype, shape, data_start + begin, end - begin)


def _check_extent(
    path: Path, entries: tuple[TensorEntry, ...], data_start: int, n_file_bytes: int
) -> None:
    """Refuse data that overlaps, and a file that does not end where its last tensor does."""
    end, last = data_start, ""
    for entry in entries:
        if entry.offset < end:
            raise CheckpointError(
                f"{path} is damaged: the data of {entry.name!r} overlaps that of {last!r}. "
                "Download it again."
            )
        end, last = entry.offset + entry.n_bytes, entry.name
    if end != n_file_bytes:
        raise CheckpointError(
            f"{path} is damaged or cut short: its header says {end} bytes, the file has "
            f"{n_file_bytes}. Download it again."
        )
