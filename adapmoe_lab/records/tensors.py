"""Records made of large arrays: one safetensors file each, known by its SHA-256."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from adapmoe_lab.records.files import HEADER, RecordError, check_version, written_atomically


class TensorRecord(ABC):
    """A record whose saved form is the content of one safetensors file."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """Return the record as the content of a safetensors file."""

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the saved form, in hex."""
        return sha256(self.to_bytes()).hexdigest()

    def fingerprint(self) -> str:
        """Identify the record by its values and how they were made."""
        return self.sha256[:16]

    def save(self, path: str | Path) -> Path:
        """Write the record as one safetensors file, whole or not at all, and return its path."""
        path = Path(path)
        with written_atomically(path) as file:
            file.write(self.to_bytes())
        return path


def tensor_bytes(
    kind: str, version: int, header: Mapping[str, Any], tensors: Mapping[str, NDArray]
) -> bytes:
    """Return named arrays and a JSON header as the content of a safetensors file."""
    described = {"kind": kind, "schema_version": version, **header}
    return save(dict(tensors), metadata={HEADER: json.dumps(described, sort_keys=True)})


@contextmanager
def loaded_tensors(
    path: Path, kind: str, version: int, expected_sha256: str | None = None
) -> Iterator[tuple[dict[str, Any], dict[str, NDArray]]]:
    """Read what `tensor_bytes` made; the block takes its parts, and one missing is damage.

    Args:
        path: the file.
        kind: what it must hold, a plural.
        version: the schema version it must have.
        expected_sha256: what the file's SHA-256 must be, if it is known.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: damaged, changed, or of another kind or version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No {kind} at {path}.")
    with path.open("rb") as content:
        found = file_digest(content, "sha256").hexdigest()
    if expected_sha256 is not None and found != expected_sha256:
        raise RecordError(
            f"{path} has the SHA-256 {found[:12]}, expected {expected_sha256[:12]}: it changed "
            f"since it was saved, or is damaged. Restore it, or fit the {kind} again."
        )
    try:
        with safe_open(path, "np") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_version(header, kind, version, path)
        yield header, tensors
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise RecordError(
            f"{path} does not hold whole {kind} ({error!r}); fit them again."
        ) from error
