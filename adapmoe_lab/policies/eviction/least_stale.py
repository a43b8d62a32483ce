"""`least_stale`: experts not used in the present forward pass leave before the others.

Both go in the order they were loaded. Our reading of arXiv 2602.03921.
"""

from __future__ import annotations

from typing import Any

from adapmoe_lab.policies.eviction.policy import EvictionPolicy, Use

FRESH = 2**60
"""Added to the priority of an expert used in the present pass; above any count of steps."""


def on_new_pass(priority: Any) -> Any:
    """Return the time of loading alone: no expert was used in this pass yet."""
    return priority - FRESH * (priority >= FRESH)


def after_use(priority: Any, state: Any, use: Use) -> tuple[Any, Any]:
    """Return the time of loading, which is now for a miss, marked as fresh."""
    return FRESH + use.clock + use.was_resident * (priority - use.clock), state


LEAST_STALE = EvictionPolicy("least_stale", after_use, on_new_pass=on_new_pass)
