"""Compiling loops over arrays with numba, once per machine. Importing it takes a third of a second.

Machine code is kept in the user's cache folder, under a name made of all that it comes from, so
that a new process does not compile again and a changed rule is never answered by old code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path
from threading import Lock
from types import CellType, FunctionType
from typing import Any

import numba
from numba.core import config
from numba.core.caching import FunctionCache

from adapmoe_lab.records.files import cache_folder
from adapmoe_lab.simulation.code_digest import (
    UnknownSourceError,
    code_digest,
    global_names,
    is_known_by_version,
)

_SETTINGS: Any = config
_UNCOUNTED: Any = {"_nrt": False}
"""Without counting references to arrays, which takes most of the time of short loops. What is
compiled so can make no arrays: numba refuses to compile it."""

_UNWRAPPED: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **_UNCOUNTED}

_inlined: Callable[..., Any] = numba.njit(forceinline=True, **_UNWRAPPED)


def inlined(function: Callable[..., Any]) -> Any:
    """Make a function that compiled ones may call, and that becomes part of them.

    So do the plain functions that it calls by a global name or closes over, and those that they
    call.
    """
    names = function.__globals__
    called_ones = {
        name: inlined(names[name])
        for name in global_names(function.__code__)
        if _is_plain(names.get(name))
    }
    cells = function.__closure__ or ()
    if called_ones or any(_is_plain(cell.cell_contents) for cell in cells):
        closure = tuple(
            CellType(inlined(cell.cell_contents)) if _is_plain(cell.cell_contents) else cell
            for cell in cells
        )
        own = function.__name__, function.__defaults__, closure
        defaults = function.__kwdefaults__
        function = FunctionType(function.__code__, {**names, **called_ones}, *own)
        function.__kwdefaults__ = defaults
    return _inlined(function)


def _is_plain(value: Any) -> bool:
    """Whether a value is a function that numba must be given in compiled form."""
    return isinstance(value, FunctionType) and not is_known_by_version(value)


called: Callable[..., Any] = numba.njit(**_UNWRAPPED)
"""Makes a function that compiled ones may call, for those so long that copies of them would take
long to compile."""


_CHANGING_SETTINGS = Lock()
"""Held while numba's settings, which all of a process share, are not as its user left them."""


class _KeptCode(FunctionCache):
    """Numba's store of machine code, in a folder that is named by all that the code comes from.

    Numba's own key pickles what a function closes over, and functions are pickled differently in
    every process. The folder's name says it better, so only the arguments' types and the processor
    are left to tell apart.
    """

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        fields = tuple(getattr(argument, "fields", None) for argument in sig)
        return sig, fields, codegen.magic_tuple()


class CompiledFunction:
    """A function compiled when it is first called, or taken from the cache folder.

    It may call inlined functions and read constants, of any module or closed over; its code is
    known by theirs. What it reads must be there by the first call, and is not read again after it.
    It makes no arrays, and holds no lock while it runs.

    Attributes:
        dispatcher: numba's own object.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        """Take the function; nothing is compiled yet."""
        update_wrapper(self, function)
        self.dispatcher: Any = numba.njit(nogil=True, **_UNCOUNTED)(function)
        self._has_looked = False

    def __call__(self, *args: Any) -> Any:
        """Run it on arrays and numbers."""
        if not self._has_looked:
            self._look_for_kept_code()
        return self.dispatcher(*args)

    def _look_for_kept_code(self) -> None:
        """Let numba read and keep code where all that it comes from is the same.

        Where nothing can be kept, or it cannot be told what has changed, every process compiles
        for itself.
        """
        with _CHANGING_SETTINGS:
            if self._has_looked:
                return
            folder = self._folder()
            if folder is not None:
                elsewhere, _SETTINGS.CACHE_DIR = _SETTINGS.CACHE_DIR, str(folder)
                try:
                    self.dispatcher._cache = _KeptCode(self.dispatcher.py_func)
                finally:
                    _SETTINGS.CACHE_DIR = elsewhere
            self._has_looked = True

    def _folder(self) -> Path | None:
        """Return a folder that can be written, or None if there is none."""
        try:
            folder = cache_folder() / "compiled" / code_digest(self.dispatcher)
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, UnknownSourceError):
            return None
        return folder if os.access(folder, os.W_OK) else None


compiled = CompiledFunction
"""Makes a function that Python code calls."""
