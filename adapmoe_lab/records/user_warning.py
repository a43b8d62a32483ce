"""Warnings that name the user's line, however deep in the package their cause is found."""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from pathlib import Path

OWN = (str(Path(__file__).parents[1]) + os.sep, contextlib.__file__)
"""Where frames lie that are passed over: this package, and what enters its `with` blocks."""


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, and name the line that called into the package."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(OWN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
