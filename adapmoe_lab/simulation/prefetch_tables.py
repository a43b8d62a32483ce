"""Prefetch tables: where notebooks of version 0.1 import them from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from adapmoe_lab.deprecated import moved_name

MOVED = {
    "best_prefetch": "best_prefetch",
    "buffer_slots": "buffer_slots",
    "prefetch_choices": "prefetch_choices",
}
"""By old name, the public name below `lab`."""

CHOICES = {"none": "nobody", "all": "everybody"}
"""Choices of sources that had another name."""

T = TypeVar("T")


def __getattr__(name: str) -> Any:
    """Return what has moved, with a warning; choices keep the names they had."""
    found = moved_name(__name__, name, MOVED)
    if name == "prefetch_choices":
        return lambda *args, **options: _renamed(found(*args, **options))
    if name == "best_prefetch":
        return lambda *args, **options: _renamed_times(*found(*args, **options))
    return found


def _renamed(choices: Mapping[str, T]) -> dict[str, T]:
    return {CHOICES.get(name, name): value for name, value in choices.items()}


def _renamed_times(table: Any, times: Mapping[str, float]) -> tuple[Any, dict[str, float]]:
    return table, _renamed(times)
