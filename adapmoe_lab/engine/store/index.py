"""The index of an on-disk store, read once and compared with what is wanted."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapmoe_lab.engine.store.expert_store import Formats, buffer_stride
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.records import PrecisionPlan
from adapmoe_lab.records.files import RecordError, check_writable, known_values

STORE_VERSION = 2
"""Of the index, and of how experts lie in their bytes."""

BLOB, INDEX = "experts.bin", "experts.json"
IN_INDEX = ("schema_version", "identity", "blob_bytes", "plain", "experts")
OF_EXPERT = ("offset", "bytes", "precision", "crc32")
"""What the index says of each expert."""


@dataclass(frozen=True)
class StoreIndex:
    """The index of a prepared store.

    Attributes:
        folder: where the store lies.
        identity: of the weights that it was prepared from.
        blob_bytes: size of the blob.
        plain: precision of what packed experts hold unpacked, such as biases; None where there is
            nothing of that kind, and in stores of version 0.1, which do not say.
        experts: place, size, precision and checksum of every expert, [L][E].
    """

    folder: Path
    identity: str
    blob_bytes: int
    plain: str | None
    experts: list[list[dict[str, Any]]]

    @property
    def precisions(self) -> PrecisionPlan:
        """How every expert is stored."""
        names = [[entry["precision"] for entry in layer] for layer in self.experts]
        sizes = [[entry["bytes"] for entry in layer] for layer in self.experts]
        return PrecisionPlan(tuple(map(tuple, names)), np.array(sizes))

    def check_layout(self, formats: Formats) -> None:
        """Refuse a store that holds other bytes than the layouts asked for.

        Raises:
            CheckpointError: experts are stored otherwise, or the blob is missing or cut short.
        """
        plain = plain_precision(formats)
        if plain is not None and self.plain not in (plain, None):
            raise CheckpointError(
                f"{self.folder} holds biases as {self.plain}, asked for were {plain}; load with "
                f"dtype={self.plain!r}, or name a new folder."
            )
        found, wanted = self.precisions, PrecisionPlan.of(formats)
        if found != wanted:
            raise CheckpointError(
                f"{self.folder} holds experts as {found}, asked for were {wanted}; give its "
                f"precision as expert_dtype, or name a new folder ({_unlike(found, wanted)})."
            )
        if self.plain is None and plain in ("bfloat16", "float16"):
            raise CheckpointError(
                f"{self.folder} does not say whether its biases are bfloat16 or float16, as stores "
                "of version 0.1 do not; prepare the store again in a new folder."
            )
        self._check_blob()

    def _check_blob(self) -> None:
        blob = self.folder / BLOB
        if not blob.is_file():
            raise CheckpointError(
                f"{blob}, which holds the experts of {INDEX} beside it, is missing; restore it, or "
                "remove the folder to prepare the store again."
            )
        size = blob.stat().st_size
        if size != self.blob_bytes:
            raise CheckpointError(
                f"{blob} has {size} bytes, its index says {self.blob_bytes}: it was cut short or "
                "replaced; prepare the store again."
            )


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds a prepared store."""
    return (folder / INDEX).is_file()


def read_index(folder: Path) -> StoreIndex:
    """Read what a prepared store says of itself; no expert is read.

    Raises:
        FileNotFoundError: there is no prepared store.
        CheckpointError: the index is damaged or of another version.
    """
    path = folder / INDEX
    if not is_prepared(folder):
        raise FileNotFoundError(f"{folder} holds no prepared store ({INDEX} is missing).")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); prepare the store again.") from error
    if version != STORE_VERSION:
        raise CheckpointError(
            f"{folder} has schema version {version}, this adapmoe-lab reads {STORE_VERSION}; "
            "prepare the store again."
        )
    try:
        known = known_values(values, str(path), IN_INDEX, later=("plain",))
        for layer, experts in enumerate(known["experts"]):
            for expert, entry in enumerate(experts):
                known_values(entry, f"{path}, expert {expert} of layer {layer},", OF_EXPERT)
    except (RecordError, TypeError) as error:
        raise CheckpointError(f"{error} Prepare the store again.") from error
    return StoreIndex(
        folder, known["identity"], known["blob_bytes"], known.get("plain"), known["experts"]
    )


def find_store(folder: Path) -> StoreIndex | None:
    """Return what the store in a folder says of itself; None where it is to be prepared.

    Raises:
        FileExistsError: there is something else.
        CheckpointError: the index is damaged or of another version.
    """
    if is_prepared(folder):
        return read_index(folder)
    check_vacant(folder)
    return None


def check_vacant(folder: Path) -> None:
    """Refuse a place for a new store that is taken.

    Raises:
        FileExistsError: there is something.
    """
    if folder.exists():
        raise FileExistsError(in_the_way(folder))


def check_room(folder: Path, formats: Formats) -> None:
    """Refuse a place where a store of these layouts cannot be written.

    Raises:
        OSError: something is there, no file can be written, or too little of the disk is free.
    """
    check_vacant(folder)
    check_writable(folder)
    disk = folder.absolute().parent
    while not disk.exists():
        disk = disk.parent
    needed, free = blob_bytes(formats), shutil.disk_usage(disk).free
    if needed > free:
        raise OSError(
            f"The store takes {needed / 2**30:.2f} GiB, {disk} has {free / 2**30:.2f} GiB free; "
            "name a folder on a larger disk."
        )


def blob_bytes(formats: Formats) -> int:
    """Return the size of the blob of experts in these layouts."""
    return sum(buffer_stride(layout) for layer in formats for layout in layer)


def plain_precision(formats: Formats) -> str | None:
    """Return the precision of what packed experts hold unpacked; None if they hold nothing such."""
    names = {
        field.precision.name
        for layout in {layout for layer in formats for layout in layer}
        if any(field.precision.is_packed for field in layout.fields)
        for field in layout.fields
        if not field.precision.is_packed
    }
    return min(names, default=None)  # a model has one of them


def in_the_way(folder: Path) -> str:
    """Return that a place for a new store is taken."""
    return f"{folder} exists; a prepared store is never overwritten, name another."


def _unlike(found: PrecisionPlan, wanted: PrecisionPlan) -> str:
    """Return how many experts of two layouts differ, and in what."""
    if found.shape != wanted.shape:
        return f"{found.shape} layers and experts are not {wanted.shape}"
    n_unlike = found.n_unlike(wanted)
    return f"{n_unlike} experts differ" if n_unlike else "they lie in other bytes"
