"""Which weights a checkpoint holds: one digest over the bytes of all its tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapmoe_lab.models.checkpoint.byte_progress import byte_progress
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError, ShardFile, TensorEntry
from adapmoe_lab.models.checkpoint.shards import ShardIndex
from adapmoe_lab.records.files import cache_folder, digest, save_json

READ_BYTES = 8 * 2**20
N_THREADS = 4
DIGEST_LENGTH = 32
"""Hex digits kept of each tensor's SHA-256."""


def weights_identity(index: ShardIndex) -> str:
    """Return what tells these weights from all others, however they are divided into files.

    Every byte of every tensor takes part, with its name, element type and shape. The digests of a
    file's tensors are kept in the user's cache folder, by path, size, time of writing and header,
    so that only the first call reads the files; a bar shows the progress where that takes long.

    Raises:
        CheckpointError: a file was cut short meanwhile.
    """
    known = {file.name: _kept_digests(index.folder, file) for file in index.files}
    unknown = [file for file in index.files if known[file.name] is None]
    with byte_progress("Identifying weights", sum(file.n_bytes for file in unknown)) as advance:
        for file in unknown:
            known[file.name] = _file_digests(index.folder, file, advance)
            _keep_digests(index.folder, file, known[file.name])
    sha = hashlib.sha256()
    for name in index.names:
        entry = index.entry(name)
        described = json.dumps([name, entry.dtype, entry.shape, known[entry.file][name]])
        sha.update(described.encode())
    return f"tensors:{sha.hexdigest()[:DIGEST_LENGTH]}"


def _file_digests(
    folder: Path, file: ShardFile, advance: Callable[[int], object]
) -> dict[str, str]:
    """Return the digest of every tensor of a file, by name."""
    descriptor = os.open(folder / file.name, os.O_RDONLY)

    def of_tensor(entry: TensorEntry) -> str:
        sha, start, end = hashlib.sha256(), entry.offset, entry.offset + entry.n_bytes
        while start < end:
            content = os.pread(descriptor, min(READ_BYTES, end - start), start)
            if not content:
                raise CheckpointError(
                    f"{folder / file.name} was cut short while it was read; restore it and load "
                    "again."
                )
            sha.update(content)
            advance(len(content))
            start += len(content)
        return sha.hexdigest()[:DIGEST_LENGTH]

    pool = ThreadPoolExecutor(min(N_THREADS, os.cpu_count() or 1))
    try:
        digests = pool.map(of_tensor, file.entries)
        return {entry.name: found for entry, found in zip(file.entries, digests, strict=True)}
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest of the file
        os.close(descriptor)


def _kept_digests(folder: Path, file: ShardFile) -> Mapping[str, str] | None:
    """Return what an earlier call found in the file as it is now; None if there was none."""
    try:
        kept = json.loads(_place(folder, file).read_bytes())
        same = kept["state"] == _state(file)
        return kept["tensors"] if same else None
    except (OSError, ValueError, KeyError, TypeError):  # absent or damaged: read the file again
        return None


def _keep_digests(folder: Path, file: ShardFile, digests: Mapping[str, str]) -> None:
    try:
        save_json(_place(folder, file), {"state": _state(file), "tensors": digests})
    except OSError:  # a cache folder that cannot be written costs time, nothing else
        return


def _place(folder: Path, file: ShardFile) -> Path:
    path = str((folder / file.name).resolve())
    return cache_folder() / "tensor-digests" / f"{digest(path)}.json"


def _state(file: ShardFile) -> dict[str, int | str]:
    return {"n_bytes": file.n_bytes, "mtime_ns": file.mtime_ns, "header": file.header_digest}
