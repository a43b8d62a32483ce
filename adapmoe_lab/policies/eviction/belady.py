"""`belady`: the expert whose next use is farthest leaves first.

In simulation only: the bound for policies that keep what they load.
"""

from __future__ import annotations

from typing import Any

from adapmoe_lab.policies.eviction.policy import NEXT_USE, EvictionPolicy, Use

LAST_TIME = 2**31
"""Priorities count back from here; after any time of a trace."""


def after_use(_: Any, state: Any, use: Use) -> tuple[Any, Any]:
    """Return the time that is left after the next use."""
    return LAST_TIME - use.oracle_input, state


BELADY = EvictionPolicy("belady", after_use, oracle_input=NEXT_USE)
