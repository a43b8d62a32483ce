"""`hobbit`: the smallest sum of four terms leaves first (arXiv 2411.01433, section 3.4).

Last use, uses and uses in high precision, each over the forward passes so far, less the layers
until the expert's layer comes, over all layers. The weights are equal. All experts have one
precision here: a use counts as one in high precision where HOBBIT would have loaded the expert so.
Nothing is reset when a sequence begins.
"""

from __future__ import annotations

from typing import Any

from adapmoe_lab.policies.eviction.policy import EvictionPolicy, Use

HIGH_PRECISION_SHARE = (3, 5)
"""HOBBIT loads an expert in high precision while those ranked above it hold at most this share,
three fifths."""


def is_high_precision(scores: Any, own: int) -> Any:
    """Return whether HOBBIT would load an expert in high precision.

    Args:
        scores: sums of the router's scores [n] of the step's set.
        own: the expert's place among them.
    """
    part, whole = HIGH_PRECISION_SHARE
    above = total = 0
    for score in scores:
        total += score
        if score > scores[own]:
            above += score
    return whole * above <= part * total


def after_use(priority: Any, last_pass: Any, use: Use) -> tuple[Any, Any]:
    """Return the three terms times passes and layers, and the pass of the use.

    The last use moves on to this pass; the use counts once, and once more in high precision.
    """
    now = use.n_passes + 0 * last_pass  # as many as there are experts
    return priority + use.n_layers * (now - last_pass + 1 + use.oracle_input), now


def penalty_per_layer(n_passes: Any) -> Any:
    """Return a layer's part of the fourth term, times passes and layers as the others are."""
    return n_passes


HOBBIT = EvictionPolicy(
    "hobbit",
    after_use,
    oracle_input=is_high_precision,
    penalty_per_layer=penalty_per_layer,
    keeps_state=True,
)
