"""Compiling loops over arrays with numba, once per machine. Importing it takes a third of a second.

Machine code is kept in the user's cache folder, under a name made of the sources it comes from,
so that a new process does not compile again and a changed rule is never answered by old code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core import config

from adapmoe_lab import policies, records, simulation
from adapmoe_lab.records.files import cache_folder, digest

_SETTINGS: Any = config
_UNCOUNTED: Any = {"_nrt": False}
"""Without counting references to arrays, which takes most of the time of short loops. What is
compiled so can make no arrays: numba refuses to compile it."""

_UNWRAPPED: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **_UNCOUNTED}

inlined: Callable[..., Any] = numba.njit(forceinline=True, **_UNWRAPPED)
"""Makes a function that compiled ones may call, and that becomes part of them."""

called: Callable[..., Any] = numba.njit(**_UNWRAPPED)
"""Makes a function that compiled ones may call, for those so long that copies of them would take
long to compile."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called, or take it from the cache folder.

    It may call inlined functions and read constants of records, policies and simulation, whose
    sources its code is known by. It makes no arrays, and holds no lock while it runs.
    """
    folder = cache_folder() / "compiled" / _sources()
    dispatcher = numba.njit(nogil=True, **_UNCOUNTED)(function)
    if _can_write(folder):  # else every process compiles for itself
        elsewhere, _SETTINGS.CACHE_DIR = _SETTINGS.CACHE_DIR, str(folder)
        try:
            dispatcher.enable_caching()
        finally:
            _SETTINGS.CACHE_DIR = elsewhere
    return dispatcher


@cache
def _sources() -> str:
    """Identify all that compiled code can come from."""
    folders = [folder for floor in (records, policies, simulation) for folder in floor.__path__]
    files = sorted(path for folder in folders for path in Path(folder).glob("*.py"))
    return digest(*(path.read_bytes() for path in files))


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
