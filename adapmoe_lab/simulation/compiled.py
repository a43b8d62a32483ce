"""Compiling loops over arrays with numba, once per machine. Importing it takes a third of a second.

Machine code is kept in the user's cache folder, under a name made of the sources it comes from,
so that a new process does not compile again and a changed rule is never answered by old code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import config

from adapmoe_lab.policies import eviction
from adapmoe_lab.records.files import cache_folder, digest

_SETTINGS: Any = config
_INLINED: Any = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

inlined: Callable[..., Any] = numba.njit(**_INLINED)
"""Makes a function that compiled ones may call, and that becomes part of them."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called, or take it from the cache folder.

    It may call inlined functions of its own module and of `policies.eviction`, which are the
    sources its code is known by. It holds no lock while it runs.
    """
    sources = (function.__code__.co_filename, eviction.__file__, __file__)
    folder = cache_folder() / "compiled" / digest(*(Path(path).read_bytes() for path in sources))
    dispatcher = numba.njit(nogil=True)(function)
    if _can_write(folder):  # else every process compiles for itself
        elsewhere, _SETTINGS.CACHE_DIR = _SETTINGS.CACHE_DIR, str(folder)
        try:
            dispatcher.enable_caching()
        finally:
            _SETTINGS.CACHE_DIR = elsewhere
    return dispatcher


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
