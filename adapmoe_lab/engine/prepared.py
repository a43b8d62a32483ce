"""A store saved once and reopened in an instant: a blob of rows and an index of them."""

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

from adapmoe_lab.engine.ledger import ChecksumLedger, checksum
from adapmoe_lab.engine.store import ExpertStore, Formats, row_stride
from adapmoe_lab.models.shard_file import CheckpointError
from adapmoe_lab.records import PrecisionPlan
from adapmoe_lab.records.files import RecordError, known_values, written_atomically

STORE_VERSION = 2
"""Of the index, and of how experts lie in their bytes."""

BLOB, INDEX = "experts.bin", "experts.json"
IN_INDEX = ("offset", "bytes", "precision", "crc32")
"""What the index says of each expert."""


class PreparedStore(ExpertStore):
    """Experts in a memory-mapped blob; the operating system keeps in memory what is in use."""

    def __init__(
        self, formats: Formats, blob: torch.Tensor, offsets: list[list[int]], ledger: ChecksumLedger
    ) -> None:
        """Serve the rows of a mapped blob uint8 [n]."""
        super().__init__(formats)
        self._blob = blob
        self._offsets = offsets
        self._ledger = ledger

    def row(self, layer: int, expert: int) -> torch.Tensor:
        """Return an expert's bytes, a view of the blob; they are checked when first read."""
        start = self._offsets[layer][expert]
        row = self._blob[start : start + self.formats[layer][expert].n_bytes]
        self._ledger.check(layer, expert, row)
        return row

    def close(self) -> None:
        """Let go of the mapped file."""
        self._blob = self._blob.new_empty(0)


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds a prepared store."""
    return (folder / INDEX).is_file()


def save_store(
    store: ExpertStore,
    folder: Path,
    identity: str,
    after_expert: Callable[[int], None] | None = None,
) -> None:
    """Write a store; the folder appears only once everything in it is on disk.

    Args:
        store: the experts to write.
        folder: must not exist yet.
        identity: of the weights that the experts belong to; opening asks for the same.
        after_expert: is told the bytes of each expert written.

    Raises:
        FileExistsError: there is something at `folder`, before or after the experts are written.
    """
    if folder.exists():
        raise FileExistsError(_in_the_way(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed, free = _blob_bytes(store), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise OSError(
            f"The store takes {needed / 2**30:.2f} GiB, {folder.parent} has {free / 2**30:.2f} GiB "
            "free; name a folder on a larger disk."
        )
    _remove_leftovers(folder)
    partial = folder.parent / f"{_partial_name(folder)}{os.getpid()}-{token_hex(4)}"
    partial.mkdir()
    try:
        experts = _write_blob(store, partial / BLOB, after_expert)
        index = {
            "schema_version": STORE_VERSION,
            "identity": identity,
            "blob_bytes": needed,
            "experts": experts,
        }
        with written_atomically(partial / INDEX) as file:
            file.write(json.dumps(index).encode())
        _rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def open_store(folder: Path, identity: str, formats: Formats) -> PreparedStore:
    """Open a prepared store without reading its experts.

    Args:
        folder: what `save_store` wrote.
        identity: of the weights the caller expects.
        formats: the layouts the caller expects.

    Raises:
        FileNotFoundError: there is no prepared store.
        CheckpointError: it is of other weights, another layout or version, or damaged.
    """
    index = _read_index(folder)
    if index["identity"] != identity:
        raise CheckpointError(
            f"{folder} was prepared from other weights ({index['identity']}) than those of the "
            f"model ({identity}); name the folder of this model's store, or a new one."
        )
    entries = index["experts"]
    found, wanted = _precision_plan(entries), PrecisionPlan.of(formats)
    if found != wanted:
        raise CheckpointError(
            f"{folder} holds experts as {found}, asked for were {wanted}; give its precision as "
            f"expert_dtype, or name a new folder ({_unlike(found, wanted)})."
        )
    blob, size = folder / BLOB, (folder / BLOB).stat().st_size
    if size != index["blob_bytes"]:
        raise CheckpointError(
            f"{blob} has {size} bytes, its index says {index['blob_bytes']}: it was cut short or "
            "replaced; prepare the store again."
        )
    mapped = torch.UntypedStorage.from_file(str(blob), shared=False, nbytes=size)
    sums = np.array([[entry["crc32"] for entry in layer] for layer in entries], dtype=np.int64)
    return PreparedStore(
        formats,
        torch.tensor([], dtype=torch.uint8).set_(mapped),
        [[entry["offset"] for entry in layer] for layer in entries],
        ChecksumLedger(sums, str(folder)),
    )


def prepared_precisions(folder: Path) -> PrecisionPlan:
    """Return how every expert of a prepared store is stored."""
    return _precision_plan(_read_index(folder)["experts"])


def _precision_plan(entries: list[list[dict[str, Any]]]) -> PrecisionPlan:
    names, sizes = (
        [[entry[key] for entry in layer] for layer in entries] for key in ("precision", "bytes")
    )
    return PrecisionPlan(tuple(map(tuple, names)), np.array(sizes))


def _unlike(found: PrecisionPlan, wanted: PrecisionPlan) -> str:
    """Say how many experts of two layouts differ, and in what."""
    if found.shape != wanted.shape:
        return f"{found.shape} layers and experts are not {wanted.shape}"
    n_unlike = found.n_unlike(wanted)
    return f"{n_unlike} experts differ" if n_unlike else "they lie in other bytes"


def prepared_identity(folder: Path) -> str:
    """Return what a prepared store says it is of."""
    return _read_index(folder)["identity"]


def _read_index(folder: Path) -> dict[str, Any]:
    if not is_prepared(folder):
        raise FileNotFoundError(f"{folder} holds no prepared store ({INDEX} is missing).")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        version = index["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / INDEX} is damaged ({error}); prepare the store again."
        ) from error
    if version != STORE_VERSION:
        raise CheckpointError(
            f"{folder} has schema version {version}, this adapmoe-lab reads {STORE_VERSION}; "
            "prepare the store again."
        )
    return _checked_index(index, folder / INDEX)


def _checked_index(index: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return an index after checking that it says all it must of every expert, and no more."""
    try:
        known_values(index, str(path), ("schema_version", "identity", "blob_bytes", "experts"))
        for layer, experts in enumerate(index["experts"]):
            for expert, entry in enumerate(experts):
                known_values(entry, f"{path}, expert {expert} of layer {layer},", IN_INDEX)
    except (RecordError, TypeError) as error:
        raise CheckpointError(f"{error} Prepare the store again.") from error
    return index


def _write_blob(
    store: ExpertStore, path: Path, after_expert: Callable[[int], None] | None
) -> list[list[dict[str, Any]]]:
    """Write the rows in (layer, expert) order and return what the index says of each."""
    experts: list[list[dict[str, Any]]] = [[] for _ in range(store.n_layers)]
    with written_atomically(path) as file:
        for layer, expert in store.numbers():
            row, layout = store.row(layer, expert), store.formats[layer][expert]
            offset = file.tell()
            file.write(memoryview(row.numpy()))
            file.write(bytes(row_stride(layout) - row.numel()))
            experts[layer].append(
                {
                    "offset": offset,
                    "bytes": row.numel(),
                    "precision": layout.precision,
                    "crc32": checksum(row),
                }
            )
            if after_expert is not None:
                after_expert(row.numel())
    return experts


def _rename(partial: Path, folder: Path) -> None:
    """Let a folder that is whole appear, unless another save of the same was done before."""
    try:
        partial.rename(folder)
    except OSError as error:
        if folder.exists():
            raise FileExistsError(_in_the_way(folder)) from error
        raise


def _in_the_way(folder: Path) -> str:
    return f"{folder} exists; a prepared store is never overwritten, name another."


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


def _blob_bytes(store: ExpertStore) -> int:
    return sum(row_stride(layout) for layer in store.formats for layout in layer)
