"""What tokens have in common, by their id alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def means_by_token(
    token_ids: NDArray[np.integer],
    values: NDArray[np.floating],
    expected: NDArray[np.floating],
    worth: float = 1.0,
) -> NDArray[np.float64]:
    """Return the mean value of each distinct token, drawn towards what is expected of it.

    Args:
        token_ids: [T].
        values: of each token, [T, ...].
        expected: of each distinct token in ascending order, [N, ...], or [...] for all of them.
        worth: how many tokens the expectation counts as.

    Returns:
        Float64 [N, ...], in the order of `np.unique(token_ids)`.
    """
    distinct, places = np.unique(token_ids, return_inverse=True)
    sums = np.zeros((len(distinct), *values.shape[1:]))
    np.add.at(sums, places, values)
    counts = np.bincount(places).reshape(-1, *[1] * (values.ndim - 1))
    return (sums + worth * expected) / (counts + worth)
