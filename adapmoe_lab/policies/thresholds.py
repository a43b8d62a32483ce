"""Gating rules: where notebooks of version 0.1 import them from."""

from __future__ import annotations

from typing import Any

from adapmoe_lab.deprecated import moved_name

MOVED = {
    "RULES": "RULES",
    "largest_skipped_fraction": "largest_skipped_fraction",
}
"""By old name, the public name below `lab`."""


def __getattr__(name: str) -> Any:
    """Return what has moved, with a warning."""
    return moved_name(__name__, name, MOVED)
