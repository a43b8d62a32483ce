"""Which resident expert leaves first when room is needed.

Every policy keeps one value per expert. Of those that may leave, the one with the smallest value
goes first, ties to the lowest layer and id. How values change is three functions of one expert,
plain arithmetic that takes numbers as well as arrays: what runs a model calls them as they stand,
simulation compiles them, so that both decide alike. Values are float64, since the stamps and
counts of a long run take more digits than float32 has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

LRU, LFU, LFU_AGED, ROUTER_AVERAGE, LEAST_STALE, HOBBIT, BELADY = range(7)

SCORE_FORGETTING = 0.02
"""Share of an average of router scores that each step of the layer replaces."""

USE_FORGETTING = 0.05
"""Share of a count of uses that each step of the layer takes off; chosen on the shipped calibration
texts, whose subject changes with every text."""

FRESH = 2.0**50
"""Added to the value of an expert used in the present forward pass; above any count of steps."""

USE = 2.0**32
"""Worth of one use in LFU; the steps since, which break ties, stay below it."""

HIGH_PRECISION_SHARE = 0.6
"""HOBBIT loads an expert in high precision while those ranked above it hold at most this share."""


@dataclass(frozen=True)
class EvictionPolicy:
    """An order in which experts leave. It decides; it moves nothing.

    Attributes:
        name: what a config calls it.
        rule: which branch of the functions below is its own.
        needs_scores: whether it reads the router's scores, not only which experts were used.
        host_only: whether it takes more than one value per expert and a rule for the values of
            the step's layer, so that a step captured as a graph on the device cannot follow it.
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


def value_in_new_pass(rule: int, value: Any) -> Any:
    """Return an expert's value as a forward pass begins."""
    return value - FRESH * (value >= FRESH) if rule == LEAST_STALE else value


def value_in_new_step(rule: int, value: Any, score: Any) -> Any:
    """Return an expert's value as its layer's step begins, whether it is used or not.

    Args:
        rule: whose rule.
        value: the value so far.
        score: the router's score of the expert, mean over the step's tokens.
    """
    if rule == LFU_AGED:
        return value * (1 - USE_FORGETTING)
    if rule == ROUTER_AVERAGE:
        return value + SCORE_FORGETTING * (score - value)
    return value


def after_use(
    rule: int,
    value: Any,
    memory: Any,
    was_resident: Any,
    hint: Any,
    clock: int,
    n_layers: int,
    n_passes: int,
) -> tuple[Any, Any]:
    """Return value and memory of an expert of a step's set.

    Args:
        rule: whose rule.
        value: the value so far.
        memory: what else the rule keeps of the expert.
        was_resident: 1 for an expert resident before the step, 0 for a miss.
        hint: for HOBBIT whether the use asks for high precision, for Belady the time of the next
            use.
        clock: steps before this one, of all layers that share the slots.
        n_layers: number of layers that share the slots.
        n_passes: forward passes before this one, `clock // n_layers`; told, since a division for
            every use takes long.
    """
    if rule == LRU:
        return 2.0 * clock + 1 - was_resident, memory
    if rule == LFU:
        memory = memory * was_resident + 1
        return USE * memory + 2.0 * clock + 1 - was_resident, memory
    if rule == LFU_AGED:
        return value + 1, memory
    if rule == LEAST_STALE:
        return FRESH + clock + was_resident * (value - clock), memory
    if rule == HOBBIT:
        now = n_passes + 0 * memory
        return value + n_layers * (now - memory + 1 + hint), now
    if rule == BELADY:
        return -1 * hint, memory
    return value, memory


def asks_high_precision(above: Any, total: float) -> Any:
    """Return whether HOBBIT would load an expert in high precision.

    Args:
        above: sum of the scores of those experts of the step's set that rank above it.
        total: sum of the scores of the whole set.
    """
    return above <= HIGH_PRECISION_SHARE * total


def distance_malus(rule: int, layers_ahead: Any, n_passes: int) -> Any:
    """Return what a layer's values lose because the layer comes so many layers later.

    `n_passes` is the number of forward passes before this one.
    """
    return layers_ahead * n_passes if rule == HOBBIT else 0 * layers_ahead
