"""Fields of a record that hold one measured number: how each is saved, checked and printed.

A field declares all of that itself, so that a new number is one field.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from adapmoe_lab.records.files import RecordError

_MEASURED = "measured"


@dataclass(frozen=True)
class Measured:
    """What a field declares of its number.

    Attributes:
        in_words: what the number is of, as it is printed; empty for one that is not printed.
        saved_as: its name in a file, where it is not the field's.
        is_signed: whether it may be below zero.
        is_rate: whether it is bytes per second, and not seconds.
    """

    in_words: str = ""
    saved_as: str | None = None
    is_signed: bool = False
    is_rate: bool = False


def measured(in_words: str = "", **others: Any) -> Any:
    """Return a dataclass field of a number, None if it was not measured; see `Measured`."""
    return field(default=None, metadata={_MEASURED: Measured(in_words, **others)})


def measured_fields(record: Any) -> Iterator[tuple[Field[Any], Measured]]:
    """Yield the measured fields of a dataclass, or of an instance, in order."""
    for one in fields(record):
        if _MEASURED in one.metadata:
            yield one, one.metadata[_MEASURED]


def saved_names(record: Any) -> dict[str, str]:
    """Return the name in a file of every measured field that is called otherwise there."""
    return {one.name: m.saved_as for one, m in measured_fields(record) if m.saved_as is not None}


def check_measured(record: Any) -> None:
    """Raise RecordError where a record's measured numbers make no sense."""
    for one, about in measured_fields(record):
        value = getattr(record, one.name)
        if value is None:
            continue
        if about.is_rate and not 0 < value < math.inf:
            raise RecordError(f"{one.name} must be above zero, got {value}.")
        if about.is_signed and not math.isfinite(value):
            raise RecordError(f"{one.name} must be a number of seconds, got {value}.")
        if not about.is_rate and not about.is_signed:
            check_seconds(one.name, value)


def check_seconds(name: str, value: float) -> None:
    """Raise RecordError unless a time is finite and not negative."""
    if not 0 <= value < math.inf:
        raise RecordError(f"A hardware profile cannot hold negative times: {name} {value}.")


def numbers_in_words(record: Any, is_rate: bool) -> dict[str, float | None]:
    """Return a record's measured rates, or its measured times, by what they are of."""
    return {
        about.in_words: getattr(record, one.name)
        for one, about in measured_fields(record)
        if about.in_words and about.is_rate == is_rate
    }


def listed(values: Mapping[str, float | None], is_rate: bool) -> str:
    """Return named numbers as one line, those that are not known left out."""
    known = [(name, value) for name, value in values.items() if value is not None]
    return ", ".join(f"{name} {rate(n) if is_rate else short(n)}" for name, n in known)


def rate(bytes_per_s: float) -> str:
    """Return a rate to three digits, in GB/s."""
    return f"{bytes_per_s / 1e9:.3g} GB/s"


def short(seconds: float) -> str:
    """Return a time to three digits, in milliseconds or microseconds."""
    return f"{1e3 * seconds:.3g} ms" if abs(seconds) >= 1e-3 else f"{1e6 * seconds:.3g} us"
