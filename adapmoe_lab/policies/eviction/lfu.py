"""`lfu`: the expert used least often since it was loaded leaves first.

Ties go to the least recently used.
"""

from __future__ import annotations

from typing import Any

from adapmoe_lab.policies.eviction.policy import EvictionPolicy, Use

USE = 2**32
"""Worth of one use. The time of the last use, twice the clock, breaks ties: it does so for experts
last used within 2^31 steps of each other, whatever the clock; per 2^31 steps that another was used
later, an expert loses one use."""

MOST_USES = 2**29
"""As many uses are counted; experts with more, without leaving meanwhile, are ordered by the last.
"""


def after_use(_: Any, n_uses: Any, use: Use) -> tuple[Any, Any]:
    """Return the uses since the expert was loaded and the time of the last, and the uses alone."""
    before = n_uses * use.was_resident
    n_uses = before + (before < MOST_USES)
    return USE * n_uses + 2 * use.clock + 1 - use.was_resident, n_uses


LFU = EvictionPolicy("lfu", after_use, keeps_state=True)
