"""`router_average`: the smallest moving average of the router's score leaves first.

Every expert has one, used or not. Here an average is its value over the share that is replaced.
"""

from __future__ import annotations

from typing import Any

from adapmoe_lab.policies.eviction.fixed_point import FORGETTING_BITS, without_forgotten
from adapmoe_lab.policies.eviction.policy import EvictionPolicy, Use

SCORE_FORGETTING = round(0.02 * 2**FORGETTING_BITS)
"""Share of an average that each step of the layer replaces, 0.02."""


def on_scores(priority: Any, score: Any) -> Any:
    """Return the average with the step's mean score in it."""
    return without_forgotten(priority, SCORE_FORGETTING) + score


def after_use(priority: Any, state: Any, _: Use) -> tuple[Any, Any]:
    """Return the average as it is: a use adds nothing to the score."""
    return priority, state


ROUTER_AVERAGE = EvictionPolicy("router_average", after_use, on_scores=on_scores)
