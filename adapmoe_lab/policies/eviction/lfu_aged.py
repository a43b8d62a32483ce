"""`lfu_aged`: the least often used expert leaves first, old uses counting ever less.

Each step of a layer takes `USE_FORGETTING` off all its counts.
"""

from __future__ import annotations

from typing import Any

from adapmoe_lab.policies.eviction.fixed_point import FORGETTING_BITS, without_forgotten
from adapmoe_lab.policies.eviction.policy import EvictionPolicy, Use

USE_FORGETTING = round(0.05 * 2**FORGETTING_BITS)
"""Share of a count that each step of the layer takes off, 0.05; chosen on the shipped calibration
texts, whose subject changes with every text."""

AGED_USE = 2**46
"""Worth of one use in a count that ages, which never exceeds 20 uses. What is left of a count after
some 700 steps without a use is the same for all."""


def on_new_step(priority: Any) -> Any:
    """Return what is left of a count."""
    return without_forgotten(priority, USE_FORGETTING)


def after_use(priority: Any, state: Any, _: Use) -> tuple[Any, Any]:
    """Return the count with one use more."""
    return priority + AGED_USE, state


LFU_AGED = EvictionPolicy("lfu_aged", after_use, on_new_step=on_new_step)
