"""Standard errors over sequences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def jackknife(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]], n_tokens: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a statistic of token-weighted means, and its standard error over sequences.

    `statistic` takes the weights [S] of the sequences; each is left out once. With one sequence the
    error is not a number.
    """
    whole = statistic(n_tokens / n_tokens.sum())
    n = len(n_tokens)
    if n < 2:
        return whole, np.full(np.shape(whole), np.nan)
    without = np.where(np.eye(n, dtype=bool), 0, n_tokens)  # [S, S], one left out per row
    left_out = np.array([statistic(weights / weights.sum()) for weights in without])
    spread = ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0)
    return whole, np.sqrt((n - 1) / n * spread)
