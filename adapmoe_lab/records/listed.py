"""Files that list things of one kind, such as link targets and known models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from adapmoe_lab.records.files import RecordError, fields_of, known_values

T = TypeVar("T")


def read_listed(path: Path, kind: type[T], key: str, meaning: str) -> list[T]:
    """Return the entries of a JSON file `{"about": ..., key: [...]}`, each with a class's fields.

    Args:
        path: the file.
        kind: the dataclass that each entry is made into.
        key: what the list is called in the file, a plural in s.
        meaning: what it lists, in words.

    Raises:
        RecordError: the file is no such list, or a value is unknown or missing.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        entries: list[Any] = known_values(document, str(path), ("about", key))[key]
        return [
            kind(**fields_of(kind, entry, f"{path}, {key.removesuffix('s')} {number},"))
            for number, entry in enumerate(entries, start=1)
        ]
    except RecordError:
        raise
    except (ValueError, TypeError) as error:
        raise RecordError(f"{path} is not a list of {meaning}: {error!r}.") from error
