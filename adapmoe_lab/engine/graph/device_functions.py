"""Plain arithmetic, such as an eviction policy is made of, as functions that kernels may call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import triton
import triton.language as tl

from adapmoe_lab.simulation.code_digest import global_names


@cache
def device_function(function: Callable[..., Any]) -> Any:
    """Make a plain function one that kernels may call, and the plain ones that it calls too.

    Constants that it reads become part of the code. Triton's interpreter calls it as it stands.
    """
    names = function.__globals__
    # compiling reads annotations too, of which only constants may be global
    bound = {
        name: value if isinstance(value, FunctionType) else tl.constexpr(value)
        for name, value in names.items()
        if not name.startswith("__")
    }
    for name in global_names(function.__code__):
        if isinstance(names.get(name), FunctionType):
            bound[name] = device_function(names[name])
    compiled = triton.jit(FunctionType(function.__code__, {**names, **bound}, function.__name__))
    return compiled if isinstance(compiled, triton.JITFunction) else function
