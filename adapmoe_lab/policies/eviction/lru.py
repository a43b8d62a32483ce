"""`lru`: the least recently used expert leaves first."""

from __future__ import annotations

from typing import Any

from adapmoe_lab.policies.eviction.policy import EvictionPolicy, Use


def after_use(_: Any, state: Any, use: Use) -> tuple[Any, Any]:
    """Return the time of the use, twice the clock: a step's hits come before its misses."""
    return 2 * use.clock + 1 - use.was_resident, state


LRU = EvictionPolicy("lru", after_use)
