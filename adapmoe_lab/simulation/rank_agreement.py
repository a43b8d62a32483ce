"""How far two orders agree."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Return Spearman's rank correlation of two series [n]; ties share the mean of their ranks."""
    first, second = _ranks(np.asarray(a)), _ranks(np.asarray(b))
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: NDArray) -> NDArray[np.float64]:
    below = (values[:, None] > values[None, :]).sum(axis=1)
    return below + ((values[:, None] == values[None, :]).sum(axis=1) - 1) / 2
