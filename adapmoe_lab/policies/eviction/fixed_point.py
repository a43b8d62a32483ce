"""Averages and router scores in whole numbers, the same wherever they are computed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FORGETTING_BITS = 16
"""Bits after the point of a share that is forgotten."""

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


def without_forgotten(average: Any, share: int) -> Any:
    """Return an average less a share of it, in units of 2^-16, that a step forgets."""
    return average - (average * share >> FORGETTING_BITS)


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


def score_sums(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return the sums [E] of router scores [T, E] in units of 2^-24, of what a trace keeps."""
    bits = scores.astype(np.float16).view(np.uint16)
    return FIXED_SCORES[bits].sum(axis=0, dtype=np.int64)
