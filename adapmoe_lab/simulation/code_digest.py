"""What compiled code comes from, as one digest.

What numba compiles takes in the functions that it calls and the constants that it reads, wherever
they are defined. They are followed here as the compiler follows them: through global names,
attributes of modules, closures and defaults. Bytecode and values count; files, their places and
times do not.
"""

from __future__ import annotations

import dis
import enum
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.dispatcher import Dispatcher

from adapmoe_lab.records.files import digest

_COMPILERS = sys.version, numba.__version__, llvmlite.__version__, np.__version__
_KNOWN_BY_VERSION = {*sys.stdlib_module_names, "numba", "llvmlite", "numpy"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), np.generic, np.dtype)

_Seen = dict[int, int]
"""The functions followed so far, numbered, by their id: some call each other."""


class UnknownSourceError(ValueError):
    """Code reads something of which it cannot be told whether it has changed."""


def code_digest(function: Callable[..., Any]) -> str:
    """Identify what numba would make of a function, or of its own dispatcher, here and now.

    The processor is left out: numba itself knows for which one it compiled.

    Raises:
        UnknownSourceError: it reads a value of a kind that is not followed.
    """
    return digest(*_COMPILERS, *_of_value(function, {}))


def _of_value(value: Any, seen: _Seen) -> Iterator[str | bytes]:
    """Yield what tells a value from any other that code could read in its place."""
    if isinstance(value, Dispatcher):
        yield f"compiled {sorted(value.targetoptions.items())!r}"
        value = value.py_func
    if is_known_by_version(value):
        yield f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, FunctionType):
        yield from _of_function(value, seen)
    elif isinstance(value, enum.Enum):
        yield f"{type(value).__qualname__}.{value.name}"
        yield from _of_value(value.value, seen)
    elif isinstance(value, enum.EnumType):
        yield from _of_value(tuple(value), seen)
    elif isinstance(value, type) and issubclass(value, tuple):
        own = vars(value)
        yield f"tuple {own.get('_fields')!r} by default {own.get('_field_defaults')!r}"
    elif isinstance(value, (*_PLAIN, numba.types.Type)):
        yield f"{type(value).__qualname__} {value!r}"
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"array {value.dtype.descr} {value.shape}"
        yield value.tobytes()
    elif isinstance(value, tuple):
        yield f"{type(value).__qualname__} of {len(value)}"
        for item in value:
            yield from _of_value(item, seen)
    elif isinstance(value, frozenset):
        yield f"frozenset of {len(value)}"
        yield from sorted(digest(*_of_value(item, seen)) for item in value)
    else:
        raise UnknownSourceError(
            f"Compiled code reads {value!r}: expected functions, numbers, strings, arrays, enums, "
            f"or tuples of them, got a {type(value).__qualname__}. Give it as an argument."
        )


def _of_function(function: FunctionType, seen: _Seen) -> Iterator[str | bytes]:
    """Yield the code of a function and of all that it reaches; the second time only its number."""
    is_new = id(function) not in seen
    yield f"function {seen.setdefault(id(function), len(seen))}"
    if not is_new:
        return
    yield from _of_value(function.__defaults__ or (), seen)
    yield from _of_value(tuple(sorted((function.__kwdefaults__ or {}).items())), seen)
    for cell in function.__closure__ or ():
        yield from _of_value(cell.cell_contents, seen)
    for code in _with_nested(function.__code__):
        yield from _of_code(code, seen)
        for name in global_names(code):
            yield name
            if name in function.__globals__:  # else it is built in, or compiling it fails
                yield from _of_read(function.__globals__[name], code.co_names, seen)


def _of_code(code: CodeType, seen: _Seen) -> Iterator[str | bytes]:
    """Yield the instructions of a code object, their names and constants."""
    yield code.co_code
    yield code.co_exceptiontable
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    constants = tuple(value for value in code.co_consts if not isinstance(value, CodeType))
    yield from _of_value((counts, names, constants), seen)


def _of_read(
    value: Any, names: tuple[str, ...], seen: _Seen, within: tuple[ModuleType, ...] = ()
) -> Iterator[str | bytes]:
    """Yield a global value, or what code that uses these names can read of a module.

    `within` are the modules that it was reached through.
    """
    if not isinstance(value, ModuleType):
        yield from _of_value(value, seen)
        return
    yield value.__name__
    if value in within or value.__name__.partition(".")[0] in _KNOWN_BY_VERSION:
        return
    for name in sorted(set(names) & set(vars(value))):
        yield name
        yield from _of_read(vars(value)[name], names, seen, (*within, value))


def _with_nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_nested(constant)


def global_names(code: CodeType) -> list[str]:
    """Return the global names that code reads, sorted."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return sorted(found)


def is_known_by_version(value: Any) -> bool:
    """Return whether a function or class is Python's own, numba's or numpy's."""
    module = getattr(value, "__module__", None)
    return (
        isinstance(module, str)
        and callable(value)
        and hasattr(value, "__qualname__")
        and module.partition(".")[0] in _KNOWN_BY_VERSION
    )
