"""Which of a token's experts are run, and how the cuts that decide it are chosen.

Everything that runs evaluates one `GatingTable`; the rules below only produce tables.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.records import OFF, GatingTable, RoutingTrace, SensitivityProfile


class GatingPolicy(Protocol):
    """Decides which of the router's experts a token keeps.

    At least one expert is kept, the order of the K columns does not matter, and an expert is
    never dropped while one with a smaller share is kept.
    """

    def keep(self, layer: int, weights: Any) -> Any:
        """Return bool [T, K] for the router's weights [T, K] of one layer."""


def keep_by_cuts(weights: Any, cuts: ArrayLike) -> Any:
    """Return which experts are kept, bool [T, K], under one layer's cuts [K-1].

    `weights` [T, K] may be a numpy array or a torch tensor; the sums are taken column by column
    so that both give the same answer to the last bit. An expert is dropped once the experts
    ranked before it reach the cut of their number; ties rank by column.
    """
    shares = _shares(weights)
    top_k = shares.shape[1]
    columns = [shares[:, k] for k in range(top_k)]
    ranks, sums_before = [], []
    for k in range(top_k):
        rank, before = 0, 0.0
        for j in range(top_k):
            if j != k:
                ahead = columns[j] >= columns[k] if j < k else columns[j] > columns[k]
                rank = rank + ahead * 1
                before = before + ahead * columns[j]
        ranks.append(rank)
        sums_before.append(before)
    keep = shares == shares  # all true, in the array type that came in
    for n_kept, cut in enumerate(np.asarray(cuts, dtype=np.float32).tolist(), start=1):
        reached = shares[:, 0] != shares[:, 0]
        for k in range(top_k):
            reached = reached | ((ranks[k] == n_kept) & (sums_before[k] >= cut))
        for k in range(top_k):
            keep[:, k] &= ~(reached & (ranks[k] >= n_kept))
    return keep


def _shares(weights: Any) -> Any:
    total = weights[:, 0]
    for k in range(1, weights.shape[1]):
        total = total + weights[:, k]
    return weights / total[:, None]


def gated_weights(weights: Any, keep: Any, renormalise: bool) -> Any:
    """Return the weights [T, K] with dropped experts at zero.

    With `renormalise` the kept weights are scaled back to the sum of all K.
    """
    kept = weights * keep
    if not renormalise:
        return kept
    return kept * (weights.sum(-1) / kept.sum(-1))[:, None]


class TableGating:
    """The gating policy that evaluates a table of cuts."""

    def __init__(self, table: GatingTable) -> None:
        """Bind the table."""
        self.table = table

    def keep(self, layer: int, weights: Any) -> Any:
        """Return bool [T, K] for the router's weights [T, K] of one layer."""
        return keep_by_cuts(weights, self.table.cuts[layer])


def kept_experts(trace: RoutingTrace, table: GatingTable | None) -> NDArray[np.bool_]:
    """Return which routed experts of a trace are kept, bool [T, L, K]."""
    if table is None:
        return np.ones(trace.weights.shape, dtype=np.bool_)
    layers = range(trace.spec.n_layers)
    return np.stack([keep_by_cuts(trace.weights[:, i], table.cuts[i]) for i in layers], axis=1)


def cumulative_shares(trace: RoutingTrace) -> NDArray[np.float64]:
    """Return the share held by the best m experts, m = 1..K-1, float64 [T, L, K-1]."""
    ranked = -np.sort(-trace.shares.astype(np.float64), axis=2)
    return np.cumsum(ranked, axis=2)[:, :, :-1]


def uniform_cuts(trace: RoutingTrace, skipped_fraction: float) -> GatingTable:
    """One cut on the cumulative share for all layers, skipping the given fraction.

    With a single cut a token skips one expert for every m < K whose cumulative share reaches it,
    so the skipped fraction is the survival function of all cumulative shares.
    """
    reached = cumulative_shares(trace)
    cut = _threshold_for(reached.ravel(), trace, skipped_fraction)
    return GatingTable.per_layer(np.full(trace.spec.n_layers, cut), trace.spec.top_k)


def adapmoe_cuts(
    trace: RoutingTrace, sensitivity: SensitivityProfile, skipped_fraction: float
) -> GatingTable:
    """AdapMoE's rule at the threshold T that skips the given fraction.

    Keep the smallest m with (1 - W_m)^2 S_l <= T, that is W_m >= 1 - sqrt(T / S_l)
    (arXiv 2408.10284, section 4.1; any K).
    """
    penalty = (1 - cumulative_shares(trace)) ** 2 * sensitivity.cost[None, :, None]
    threshold = -_threshold_for(-penalty.ravel(), trace, skipped_fraction)
    if threshold < 0:
        return GatingTable.per_layer(np.full(trace.spec.n_layers, OFF), trace.spec.top_k)
    return GatingTable.per_layer(
        adapmoe_cut(threshold, sensitivity.cost), trace.spec.top_k, renormalise=False
    )


def adapmoe_cut(threshold: float, sensitivity: ArrayLike) -> NDArray[np.float64]:
    """Cuts on the share [L] of AdapMoE's rule for one threshold T; T = 0 skips nothing."""
    sensitivity = np.asarray(sensitivity, dtype=np.float64)
    if threshold == 0:
        return np.full(sensitivity.shape, OFF)
    return np.maximum(0.0, 1 - np.sqrt(threshold / np.maximum(sensitivity, 1e-300)))


def curve_cuts(
    trace: RoutingTrace, sensitivity: SensitivityProfile, skipped_fraction: float
) -> GatingTable:
    """Cuts per layer that skip the given fraction at the least predicted loss.

    Each layer offers, at every cut of the profile's grid, a skipped fraction and a loss increase.
    Minimising loss - price * skipped picks one offer per layer and the skipping grows with the
    price; the two solutions around the target are blended to meet it.
    """
    n_layers, top_k = trace.spec.n_layers, trace.spec.top_k
    reached = np.sort(cumulative_shares(trace).transpose(1, 0, 2).reshape(n_layers, -1), axis=1)

    def n_skipped(layer: int, cuts: ArrayLike) -> NDArray[np.int64]:
        return reached.shape[1] - np.searchsorted(reached[layer], cuts)

    grid = sensitivity.cuts
    skipped = np.stack([n_skipped(layer, grid) for layer in range(n_layers)]) / trace.weights.size
    loss = np.maximum.accumulate(sensitivity.increase_nats[:, ::-1], axis=1)[:, ::-1]
    prices = np.geomspace(1e-6, 1e4, 400)
    offers = np.argmin(loss - prices[:, None, None] * skipped, axis=2)  # [price, L]
    taken = np.take_along_axis(skipped, offers.T, axis=1).sum(axis=0)
    bold = min(int(np.searchsorted(taken, skipped_fraction)), len(prices) - 1)
    end = grid[offers[bold]]
    start = grid[offers[bold - 1]] if bold else np.full(n_layers, OFF)
    target = round(skipped_fraction * trace.weights.size)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        cuts = start + middle * (end - start)
        enough = sum(int(n_skipped(i, cuts[i])) for i in range(n_layers)) >= target
        low, high = (low, middle) if enough else (middle, high)
    return GatingTable.per_layer(start + high * (end - start), top_k)


def _threshold_for(
    values: NDArray[np.float64], trace: RoutingTrace, skipped_fraction: float
) -> float:
    """Return the cut on `values` (one per droppable expert) that drops the fraction of T L K.

    The cut lies between two neighbouring values, so that rounding cannot move it across one.
    """
    top_k = trace.spec.top_k
    limit = (top_k - 1) / top_k
    if not 0 <= skipped_fraction <= limit:
        raise ValueError(
            f"skipped_fraction must lie in 0..{limit:g} for top-{top_k} routing (one expert is "
            f"always kept), got {skipped_fraction:g}."
        )
    n_dropped = round(skipped_fraction * trace.weights.size)
    if n_dropped == 0:
        return OFF
    ordered = np.sort(values)[::-1]
    if n_dropped >= len(ordered):
        return float(ordered[-1]) - 1e-6
    return float((ordered[n_dropped - 1] + ordered[n_dropped]) / 2)
