"""Names of version 0.1 that copies of its notebooks import, found where they are now."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import import_module
from operator import attrgetter
from typing import Any


def moved_name(module: str, name: str, moved: Mapping[str, str]) -> Any:
    """Return what a module once held, and warn of its new name; for its `__getattr__` to call.

    Args:
        module: the module that is asked.
        name: the old name.
        moved: by old name, the public name below `lab`.

    Raises:
        AttributeError: the name is none of them.
    """
    if name not in moved:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(
        f"{module}.{name} is now lab.{moved[name]}, with `import adapmoe_lab as lab`; the old name "
        "goes with the next version.",
        DeprecationWarning,
        stacklevel=3,
    )
    return attrgetter(moved[name])(import_module("adapmoe_lab"))
