"""Which of a token's experts are run.

Everything that runs evaluates one `GatingTable`; a `Rule` chooses its cuts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.records import OFF, GatingTable, RoutingTrace
from adapmoe_lab.records.gating_table import CUMULATIVE_SHARE, SHORTFALL


def keep_by_cuts(weights: Any, cuts: ArrayLike, quantity: str = CUMULATIVE_SHARE) -> Any:
    """Return which experts are kept, bool [T, K], under one layer's cuts [K-1].

    At least one is, the order of the K columns does not matter, and an expert is never dropped
    while one with a smaller share is kept.

    `weights` [T, K] may be a numpy array or a torch tensor; sums are taken column by column, so
    that both give the same answer to the last bit. Ties rank by column.
    """
    shares = _shares(weights)
    order = _descending(shares)
    ranked = _take(shares, order)
    keep_ranked = ranked == ranked  # all true, in the array type that came in
    reached, together = ~keep_ranked[:, 0], ranked[:, 0]
    for n_kept, cut in enumerate(np.asarray(cuts, dtype=np.float32).tolist(), start=1):
        following = ranked[:, n_kept]
        reached = reached | (
            (together >= cut)
            if quantity == CUMULATIVE_SHARE
            else (1 - following / ranked[:, 0] >= cut)
        )
        keep_ranked[:, n_kept] = ~reached
        together = together + following
    return _take(keep_ranked, _inverse(order))


def _shares(weights: Any) -> Any:
    total = weights[:, 0]
    for k in range(1, weights.shape[1]):
        total = total + weights[:, k]
    return weights / total[:, None]


def _descending(shares: Any) -> Any:
    if isinstance(shares, np.ndarray):
        return np.argsort(-shares, axis=1, kind="stable")
    return shares.argsort(dim=1, descending=True, stable=True)


def _take(values: Any, order: Any) -> Any:
    if isinstance(values, np.ndarray):
        return np.take_along_axis(values, order, axis=1)
    return values.gather(1, order)


def _inverse(order: Any) -> Any:
    """Return the permutations that undo those of `order` [T, K]."""
    return np.argsort(order, axis=1) if isinstance(order, np.ndarray) else order.argsort(dim=1)


def gated_weights(weights: Any, keep: Any, renormalise: bool) -> Any:
    """Return the weights [T, K] with dropped experts at zero.

    With `renormalise` the kept weights are scaled back to the sum of all K.
    """
    kept = weights * keep
    if not renormalise:
        return kept
    return kept * (weights.sum(-1) / kept.sum(-1))[:, None]


def kept_experts(trace: RoutingTrace, table: GatingTable | None) -> NDArray[np.bool_]:
    """Return which routed experts of a trace are kept, bool [T, L, K]."""
    if table is None:
        return np.ones(trace.weights.shape, dtype=np.bool_)
    by_layer = [
        keep_by_cuts(trace.weights[:, layer], cuts, table.quantity)
        for layer, cuts in enumerate(table.cuts)
    ]
    return np.stack(by_layer, axis=1)


def top_p(n_layers: int, top_k: int, p: float) -> GatingTable:
    """Keep the fewest experts that hold the share `p` of a token's weights together."""
    if not 0 < p <= 1:
        raise ValueError(f"p must lie in 0..1, a share of the weights; got {p:g}.")
    return GatingTable.per_layer(np.full(n_layers, p), top_k)


def fixed_k(top_k: int, n_kept: ArrayLike) -> GatingTable:
    """Keep the `n_kept` [L] best experts of every token, whatever their weights.

    Raises:
        ValueError: a layer is to keep none, or more than the router chooses.
    """
    n_kept = np.asarray(n_kept, dtype=np.int64)
    if (n_kept < 1).any() or (n_kept > top_k).any():
        raise ValueError(
            f"n_kept must lie in 1..{top_k}, the experts a router chooses; got {n_kept.tolist()}."
        )
    cuts = np.full((len(n_kept), top_k - 1), OFF)
    fewer = n_kept < top_k
    cuts[fewer, n_kept[fewer] - 1] = 0.0
    return GatingTable(cuts.astype(np.float32))


def score_ratio(n_layers: int, top_k: int, ratio: float) -> GatingTable:
    """Drop the experts whose weight is at most `ratio` of the best one's (SER)."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must lie in 0..1, of the best expert's weight; got {ratio:g}.")
    cuts = np.full((n_layers, top_k - 1), 1 - ratio if ratio > 0 else OFF, dtype=np.float32)
    return GatingTable(cuts, quantity=SHORTFALL)
