"""How records reach the disk: whole or not at all, and never read as something they are not."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

HEADER = "header"
IDENTIFYING = ("kind", "schema_version")
"""What stands in every file beside the record itself."""

NONE_RENAMED: Mapping[str, str] = MappingProxyType({})
CACHE_VARIABLE = "ADAPMOE_LAB_CACHE"


class RecordError(ValueError):
    """A file or value is not the record it was expected to be."""


def check_writable(path: str | Path) -> None:
    """Raise OSError unless a file can be put at `path`; leaves nothing behind.

    For before long work whose result is to be kept there. Folders that are not there yet are made
    when the file is written, so the nearest one that is there is tried.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write.")
    folder = path.absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(
            f"{path} cannot be written: {folder} is no folder. Name another place."
        )
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise type(error)(
            f"{path} cannot be written: {folder} takes no files ({error.strerror}). Name another "
            "place."
        ) from error


@contextmanager
def written_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that replaces it only if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def json_bytes(document: Any, allow_nan: bool = True) -> bytes:
    """Return a document as the JSON text that records are kept in: indented, one last newline.

    Raises:
        RecordError: a number is not finite, and `allow_nan` is off; the text says which.
    """
    try:
        return (json.dumps(document, indent=1, allow_nan=allow_nan) + "\n").encode()
    except ValueError as error:
        place, number = next(_not_finite(document), (None, None))
        if number is None:
            raise
        raise RecordError(
            f"{place} is {number}, and only finite numbers can be saved as JSON. Correct it, or "
            "measure it again."
        ) from error


def _not_finite(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Yield where a document holds numbers that are not finite, and which: `a.b[2]`, nan."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    if isinstance(value, Mapping):
        parts = [(f"{place}.{name}" if place else str(name), part) for name, part in value.items()]
    else:
        listed = value if isinstance(value, list | tuple) else ()
        parts = [(f"{place}[{number}]", part) for number, part in enumerate(listed)]
    for name, part in parts:
        yield from _not_finite(part, name)


def save_json(path: Path, document: Any, allow_nan: bool = True) -> None:
    """Write a document as JSON, whole or not at all."""
    content = json_bytes(document, allow_nan)
    with written_atomically(path) as file:
        file.write(content)


def save_arrays(
    path: Path, kind: str, version: int, header: Mapping[str, Any], arrays: Mapping[str, NDArray]
) -> None:
    """Write named arrays and a JSON header as one .npz file."""
    described = {"kind": kind, "schema_version": version, **header}
    encoded = np.frombuffer(json.dumps(described, sort_keys=True).encode(), dtype=np.uint8)
    members: dict[str, Any] = {HEADER: encoded, **arrays}
    with written_atomically(path) as file:
        np.savez_compressed(file, **members)


def load_arrays(
    path: Path, kind: str, version: int, oldest: int | None = None
) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Read what `save_arrays` wrote, of this schema version or any back to the oldest, if given.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: the file is truncated, of another kind, or of an unknown schema version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No {kind} at {path}.")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        header = json.loads(arrays.pop(HEADER).tobytes())
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError) as error:
        raise RecordError(
            f"{path} is not a readable {kind}: it is damaged, cut short, or another kind of "
            f"file ({error}). Record it again."
        ) from error
    check_version(header, kind, version, path, oldest)
    return header, arrays


def check_version(
    header: Mapping[str, Any], kind: str, version: int, path: Path, oldest: int | None = None
) -> None:
    """Refuse a header that names another kind of record or a schema this code does not know.

    Known are `version` and those before it, back to `oldest` if that is given.
    """
    if header.get("kind") != kind:
        raise RecordError(f"{path} holds a {header.get('kind')!r}; expected a {kind!r}.")
    known = range(version if oldest is None else oldest, version + 1)
    if header.get("schema_version") not in known:
        readable = " or ".join(map(str, known))
        raise RecordError(
            f"{path} has schema version {header.get('schema_version')!r}; this adapmoe-lab reads "
            f"version {readable}. Upgrade adapmoe-lab, or record the file again with this version."
        )


def known_values(
    values: Any,
    source: str,
    names: Collection[str],
    later: Collection[str] = (),
    renamed: Mapping[str, str] = NONE_RENAMED,
) -> dict[str, Any]:
    """Return saved values by today's names, after checking that they are those of the record.

    Args:
        values: what was read.
        source: the file, and the section of it, as errors name them.
        names: of all values of the record.
        later: those of the names that files of earlier versions lack.
        renamed: today's name of each name that earlier versions saved.

    Raises:
        RecordError: a value is unknown or there twice, or one that must be there is missing.
    """
    if not isinstance(values, Mapping):
        raise RecordError(
            f"{source} holds a {type(values).__name__} where named values are expected. "
            "Restore it, or make it again with this version."
        )
    found: dict[str, Any] = {}
    read_from: dict[str, str] = {}
    for name, value in values.items():
        now = renamed.get(name, name)
        if now in read_from:
            raise RecordError(
                f"{source} holds {read_from[now]!r} and {name!r}, which are names of the same "
                "value, one of them of an earlier version. Remove one of them."
            )
        read_from[now], found[now] = name, value
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise RecordError(
            f"{source} holds {_quoted(unknown)}, which this adapmoe-lab does not know. If a later "
            "version wrote it, upgrade adapmoe-lab; if it was written by hand, correct or remove "
            "the name."
        )
    missing = [name for name in names if name not in found and name not in later]
    if missing:
        raise RecordError(
            f"{source} lacks {_quoted(missing)}. Restore it, or make it again with this version."
        )
    return found


def fields_of(
    record: Any,
    values: Any,
    source: str,
    later: Collection[str] = (),
    renamed: Mapping[str, str] = NONE_RENAMED,
) -> dict[str, Any]:
    """Return saved values of a dataclass's fields; see `known_values`."""
    return known_values(values, source, [f.name for f in fields(record)], later, renamed)


def _quoted(names: Collection[str]) -> str:
    return ", ".join(map(repr, names))


def frozen_array(
    name: str, value: ArrayLike, dtype: Any, shape: tuple[int | None, ...]
) -> NDArray[Any]:
    """Return `value` as a read-only array after checking its shape (None = any length).

    Raises:
        RecordError: the shape differs.
    """
    array = np.array(value, dtype=dtype)
    fits = array.ndim == len(shape) and all(
        want is None or want == have for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise RecordError(f"{name} must have shape [{wanted}], got {list(array.shape)}.")
    array.flags.writeable = False
    return array


def digest(*parts: bytes | str) -> str:
    """Return the first 16 hex digits of the SHA-256 of the parts, each with its length."""
    sha = hashlib.sha256()
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        sha.update(len(encoded).to_bytes(8, "little"))
        sha.update(encoded)
    return sha.hexdigest()[:16]


def cache_folder() -> Path:
    """Return where what can be made again is kept, beside no one's files.

    `$ADAPMOE_LAB_CACHE`, else `adapmoe-lab` in the user's cache folder.
    """
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapmoe-lab"
