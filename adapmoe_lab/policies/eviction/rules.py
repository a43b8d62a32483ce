"""Which resident expert leaves first when room is needed.

Every policy keeps one priority per expert. Of those that may leave, the one with the smallest
priority goes first, ties to the lowest layer and id. How priorities change is three functions of
one expert, plain arithmetic that takes numbers as well as arrays: what runs a model calls them as
they stand, simulation compiles them, so that both decide alike.

Values are int64, from 0 to below `NEVER_LEAVES`, for as many as 2^58 steps. Stamps and counts are
whole numbers, averages are in fixed point and forget by integer division: nothing depends on the
order of sums, on the machine or on how long it has run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

LRU, LFU, LFU_AGED, ROUTER_AVERAGE, LEAST_STALE, HOBBIT, BELADY = range(7)

NEVER_LEAVES = 2**62
"""The priority of what may not leave; above any other, and any other less its penalty."""

FORGETTING_BITS = 16
"""Bits after the point of the two shares below."""

SCORE_FORGETTING = round(0.02 * 2**FORGETTING_BITS)
"""Share of an average of router scores that each step of the layer replaces, 0.02."""

USE_FORGETTING = round(0.05 * 2**FORGETTING_BITS)
"""Share of a count of uses that each step of the layer takes off, 0.05; chosen on the shipped
calibration texts, whose subject changes with every text."""

AGED_USE = 2**46
"""Worth of one use in a count that ages, which never exceeds 20 uses. What is left of a count after
some 700 steps without a use is the same for all."""

FRESH = 2**60
"""Added to the priority of an expert used in the present forward pass; above any count of steps."""

USE = 2**32
"""Worth of one use in LFU. The time of the last use, twice the clock, breaks ties: it does so for
experts last used within 2^31 steps of each other, whatever the clock; per 2^31 steps that another
was used later, an expert loses one use."""

MOST_USES = 2**29
"""As many uses LFU counts; those of more, without leaving meanwhile, are ordered by the last."""

LAST_TIME = 2**31
"""Belady's priorities count back from here; after any time of a trace."""

HIGH_PRECISION_SHARE = (3, 5)
"""HOBBIT loads an expert in high precision while those ranked above it hold at most this share,
three fifths."""

SCORE_BITS = 24
"""Bits after the point of router scores: every float16 from 0 to 1 is a multiple of 2^-24."""

MEAN_BITS = 18
"""Further bits after the point of a mean of scores."""

_SCORES = np.nan_to_num(np.arange(2**16, dtype=np.uint16).view(np.float16), nan=0).clip(0, 1)
FIXED_SCORES = np.ldexp(_SCORES.astype(np.float64), SCORE_BITS).astype(np.int32)
FIXED_SCORES.flags.writeable = False
"""The router score of every bit pattern of a float16 in units of 2^-24, int32 [65536].

Exact from 0 to 1; what lies outside counts as the nearer of them, what is no number as 0.
"""


@dataclass(frozen=True)
class EvictionPolicy:
    """An order in which experts leave. It decides; it moves nothing.

    Attributes:
        name: what a config calls it.
        rule: which branch of the functions below is its own.
        needs_scores: whether it reads the router's scores, not only which experts were used.
        host_only: whether it takes more than one priority per expert and a rule for the priorities
            of the step's layer, so that a step captured as a graph on the device cannot follow it.
        needs_future: whether it reads what comes later, so that only simulation can.
        pins: whether it keeps the plan's pinned experts.
    """

    name: str
    rule: int
    needs_scores: bool = False
    host_only: bool = False
    needs_future: bool = False
    pins: bool = False


POLICIES: Mapping[str, EvictionPolicy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            EvictionPolicy("lru", LRU),
            EvictionPolicy("lfu", LFU, host_only=True),
            EvictionPolicy("lfu_aged", LFU_AGED),
            EvictionPolicy("router_average", ROUTER_AVERAGE, needs_scores=True),
            EvictionPolicy("least_stale", LEAST_STALE, host_only=True),
            EvictionPolicy("hobbit", HOBBIT, needs_scores=True, host_only=True),
            EvictionPolicy("static", LRU, pins=True),
            EvictionPolicy("belady", BELADY, host_only=True, needs_future=True),
        )
    }
)
"""Eviction policies by name.

- `lru`: least recently used.
- `lfu`: least often used since it was loaded, ties to the least recently used.
- `lfu_aged`: least often used, each step of the layer taking `USE_FORGETTING` off all its counts.
- `router_average`: smallest moving average of the router's score, of every expert, used or not.
- `least_stale`: experts not used in the present forward pass before the others, both in the order
  they were loaded. Our reading of arXiv 2602.03921.
- `hobbit`: smallest sum of four terms (arXiv 2411.01433, section 3.4): last use, uses and uses in
  high precision, each over the forward passes so far, less the layers until the expert's layer
  comes, over all layers. The weights are equal. All experts have one precision here: a use counts
  as one in high precision where HOBBIT would have loaded the expert so. Nothing is reset when a
  sequence begins.
- `static`: the plan's pinned experts never leave, the others by least recent use.
- `belady`: farthest next use. In simulation only: the bound for policies that keep what they load.
"""


def priority_in_new_pass(rule: int, priority: Any) -> Any:
    """Return an expert's priority as a forward pass begins."""
    return priority - FRESH * (priority >= FRESH) if rule == LEAST_STALE else priority


def priority_in_new_step(rule: int, priority: Any, score: Any) -> Any:
    """Return an expert's priority as its layer's step begins, whether it is used or not.

    Args:
        rule: whose rule.
        priority: the priority so far.
        score: the router's score of the expert, as `mean_score` gives it.
    """
    if rule == LFU_AGED:
        return priority - (priority * USE_FORGETTING >> FORGETTING_BITS)
    if rule == ROUTER_AVERAGE:  # the average over the share that is replaced
        return priority - (priority * SCORE_FORGETTING >> FORGETTING_BITS) + score
    return priority


def token_weight(n_tokens: Any) -> Any:
    """Return what one of so many tokens counts in a mean of their scores, in units of 2^-36."""
    return 2 ** (2 * MEAN_BITS) // n_tokens


def mean_score(total: Any, weight: Any) -> Any:
    """Return the mean of a step's router scores in units of 2^-42.

    Args:
        total: sum of the tokens' scores in units of 2^-24.
        weight: `token_weight` of the step; multiplying takes far less than dividing.
    """
    return total * weight >> MEAN_BITS


def after_use(
    rule: int,
    priority: Any,
    state: Any,
    was_resident: Any,
    oracle_input: Any,
    clock: int,
    n_layers: int,
    n_passes: int,
) -> tuple[Any, Any]:
    """Return priority and state of an expert of a step's set.

    Args:
        rule: whose rule.
        priority: the priority so far.
        state: what else the rule keeps of the expert.
        was_resident: 1 for an expert resident before the step, 0 for a miss.
        oracle_input: for HOBBIT whether the use asks for high precision, for Belady the time of the
            next use.
        clock: steps before this one, of all layers that share the slots.
        n_layers: number of layers that share the slots.
        n_passes: forward passes before this one, `clock // n_layers`; told, since a division for
            every use takes long.
    """
    if rule == LRU:
        return 2 * clock + 1 - was_resident, state
    if rule == LFU:
        before = state * was_resident
        state = before + (before < MOST_USES)
        return USE * state + 2 * clock + 1 - was_resident, state
    if rule == LFU_AGED:
        return priority + AGED_USE, state
    if rule == LEAST_STALE:
        return FRESH + clock + was_resident * (priority - clock), state
    if rule == HOBBIT:
        now = n_passes + 0 * state
        return priority + n_layers * (now - state + 1 + oracle_input), now
    if rule == BELADY:
        return LAST_TIME - oracle_input, state
    return priority, state


def is_high_precision(above: Any, total: Any) -> Any:
    """Return whether HOBBIT would load an expert in high precision.

    Args:
        above: sum of the scores of those experts of the step's set that rank above it.
        total: sum of the scores of the whole set.
    """
    part, whole = HIGH_PRECISION_SHARE
    return whole * above <= part * total


def distance_penalty(rule: int, layers_ahead: Any, n_passes: int) -> Any:
    """Return what a layer's priorities lose because the layer comes so many layers later.

    `n_passes` is the number of forward passes before this one.
    """
    return layers_ahead * n_passes if rule == HOBBIT else 0 * layers_ahead
