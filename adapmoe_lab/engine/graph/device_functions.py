"""Plain arithmetic, such as an eviction policy is made of, as functions that kernels may call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import CellType, FunctionType
from typing import Any

import triton
import triton.language as tl

from adapmoe_lab.simulation.code_digest import global_names


@cache
def device_function(function: Callable[..., Any]) -> Any:
    """Make a plain function one that kernels may call, and the plain ones that it calls too.

    Constants that it reads or closes over become part of the code. Triton's interpreter calls it as
    it stands.
    """
    code, names = function.__code__, function.__globals__
    is_read = {name for name in global_names(code) if name in names}
    # compiling reads annotations too, of which only constants may be global
    bound = {
        name: _bound(value)
        for name, value in names.items()
        if name in is_read or not (name.startswith("__") or isinstance(value, FunctionType))
    }
    closed_over = [_bound(cell.cell_contents) for cell in function.__closure__ or ()]
    # what is closed over, older tritons look for among the globals
    everything = {**names, **bound, **dict(zip(code.co_freevars, closed_over, strict=True))}
    own = function.__name__, function.__defaults__, tuple(map(CellType, closed_over))
    compiled = triton.jit(FunctionType(code, everything, *own))
    return compiled if isinstance(compiled, triton.JITFunction) else function


def _bound(value: Any) -> Any:
    """Return what a compiled function may read in a value's place."""
    return device_function(value) if isinstance(value, FunctionType) else tl.constexpr(value)
