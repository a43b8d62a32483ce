"""How a byte budget becomes one surrogate rank per layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records import MoESpec


def affordable_ranks(spec: MoESpec, budget: int, item_bytes: int) -> int:
    """Return how many ranks the layers of a model can have together within a byte budget.

    Every expert needs an offset [D]; one rank of a layer is a row and a column [D] per expert.

    Args:
        spec: the model.
        budget: bytes for surrogates on the device.
        item_bytes: bytes of a number there.

    Raises:
        ValueError: the budget does not hold the offsets.
    """
    column_bytes = spec.n_experts * spec.hidden_size * item_bytes
    offset_bytes = spec.n_layers * column_bytes
    if budget < offset_bytes:
        raise ValueError(
            f"{budget} bytes do not hold the least surrogates of {spec.model_id}, one offset per "
            f"expert: they take {offset_bytes} bytes."
        )
    most = spec.n_layers * spec.hidden_size
    return min(most, (budget - offset_bytes) // (2 * column_bytes))


def ranks_by_benefit(worth: NDArray[np.float64], n_ranks: int) -> NDArray[np.int64]:
    """Divide ranks over the layers, each next one to where it is worth most.

    Args:
        worth: float64 [L, R], what rank r + 1 is worth in a layer; never rising along a row, so
            that this greedy choice is the best there is.
        n_ranks: ranks of all layers together; a layer gets at most R.

    Returns:
        int64 [L].
    """
    n_layers, most = worth.shape
    best_first = np.argsort(-worth, axis=None, kind="stable")[: min(n_ranks, worth.size)]
    return np.bincount(best_first // most, minlength=n_layers)
