"""A store saved once and reopened in an instant: a blob of buffers and an index of them."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import psutil
import torch

from adapmoe_lab.engine.store.checksums import ChecksumManifest, checksum
from adapmoe_lab.engine.store.expert_store import ExpertStore, Formats, buffer_stride
from adapmoe_lab.engine.store.index import (
    BLOB,
    INDEX,
    STORE_VERSION,
    StoreIndex,
    blob_bytes,
    check_room,
    in_the_way,
    plain_precision,
)
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.records.files import written_atomically


class PreparedStore(ExpertStore):
    """Experts in a memory-mapped blob; the operating system keeps in memory what is in use."""

    def __init__(
        self,
        formats: Formats,
        blob: torch.Tensor,
        offsets: list[list[int]],
        manifest: ChecksumManifest,
    ) -> None:
        """Serve the buffers of a mapped blob uint8 [n]."""
        super().__init__(formats)
        self._blob = blob
        self._offsets = offsets
        self._manifest = manifest

    def buffer(self, layer: int, expert: int) -> torch.Tensor:
        """Return an expert's bytes, a view of the blob; they are checked when first read."""
        start = self._offsets[layer][expert]
        buffer = self._blob[start : start + self.formats[layer][expert].n_bytes]
        self._manifest.check(layer, expert, buffer)
        return buffer

    def close(self) -> None:
        """Let go of the mapped file."""
        self._blob = self._blob.new_empty(0)


def save_store(
    store: ExpertStore,
    folder: Path,
    identity: str,
    after_expert: Callable[[int], None] | None = None,
    before_it_appears: Callable[[], object] | None = None,
) -> None:
    """Write a store; the folder appears only once everything in it is on disk.

    Args:
        store: the experts to write.
        folder: must not exist yet.
        identity: of the weights that the experts belong to; opening asks for the same.
        after_expert: is told the bytes of each expert written.
        before_it_appears: is called once all is written; if it raises, nothing is left behind.

    Raises:
        FileExistsError: there is something at `folder`, before or after the experts are written.
        OSError: it cannot be written there.
    """
    check_room(folder, store.formats)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    partial = folder.parent / f"{_partial_name(folder)}{os.getpid()}-{token_hex(4)}"
    partial.mkdir()
    try:
        experts = _write_blob(store, partial / BLOB, after_expert)
        index = {
            "schema_version": STORE_VERSION,
            "identity": identity,
            "blob_bytes": blob_bytes(store.formats),
            "plain": plain_precision(store.formats),
            "experts": experts,
        }
        with written_atomically(partial / INDEX) as file:
            file.write(json.dumps(index).encode())
        if before_it_appears is not None:
            before_it_appears()
        _rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def open_store(index: StoreIndex, identity: str, formats: Formats) -> PreparedStore:
    """Open a prepared store without reading its experts.

    Args:
        index: what the store says of itself.
        identity: of the weights the caller expects.
        formats: the layouts the caller expects.

    Raises:
        CheckpointError: it is of other weights, of another layout, or damaged.
    """
    folder = index.folder
    if index.identity != identity:
        raise CheckpointError(
            f"{folder} was prepared from other weights ({index.identity}) than those of the "
            f"model ({identity}); name the folder of this model's store, or a new one."
        )
    index.check_layout(formats)
    mapped = torch.UntypedStorage.from_file(
        str(folder / BLOB), shared=False, nbytes=index.blob_bytes
    )
    sums = [[entry["crc32"] for entry in layer] for layer in index.experts]
    return PreparedStore(
        formats,
        torch.tensor([], dtype=torch.uint8).set_(mapped),
        [[entry["offset"] for entry in layer] for layer in index.experts],
        ChecksumManifest(np.array(sums, dtype=np.int64), str(folder)),
    )


def _write_blob(
    store: ExpertStore, path: Path, after_expert: Callable[[int], None] | None
) -> list[list[dict[str, Any]]]:
    """Write the buffers in (layer, expert) order and return what the index says of each."""
    experts: list[list[dict[str, Any]]] = [[] for _ in range(store.n_layers)]
    with written_atomically(path) as file:
        for layer, expert in store.numbers():
            buffer, layout = store.buffer(layer, expert), store.formats[layer][expert]
            offset = file.tell()
            file.write(memoryview(buffer.numpy()))
            file.write(bytes(buffer_stride(layout) - buffer.numel()))
            experts[layer].append(
                {
                    "offset": offset,
                    "bytes": buffer.numel(),
                    "precision": layout.precision,
                    "crc32": checksum(buffer),
                }
            )
            if after_expert is not None:
                after_expert(buffer.numel())
    return experts


def _rename(partial: Path, folder: Path) -> None:
    """Let a folder that is whole appear, unless another save of the same was done before."""
    try:
        partial.rename(folder)
    except OSError as error:
        if folder.exists():
            raise FileExistsError(in_the_way(folder)) from error
        raise


def _remove_leftovers(folder: Path) -> None:
    """Remove what saves of the same store that were killed on this machine left behind."""
    start = _partial_name(folder)
    for partial in folder.parent.iterdir():
        process = partial.name.removeprefix(start).partition("-")[0]
        if (
            partial.name.startswith(start)
            and process.isdigit()
            and not psutil.pid_exists(int(process))
        ):
            shutil.rmtree(partial, ignore_errors=True)


def _partial_name(folder: Path) -> str:
    """Return how the names begin of what is being written for a folder; a process follows."""
    return f".{folder.name}.partial-{platform.node()}-"
