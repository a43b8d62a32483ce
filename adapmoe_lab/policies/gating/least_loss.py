"""`curve`: cuts per layer for the least predicted loss."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.gating.rule import TraceSize, cumulative_shares, cut_reached_by
from adapmoe_lab.records import GatingTable, RoutingTrace, SensitivityProfile


class LeastLoss:
    """Cuts per layer that skip the given fraction at the least predicted loss.

    Every layer's curve of loss over skipped experts is replaced by its lower convex hull. Taking
    the hulls' segments in the order of their slopes is then the exact optimum for every fraction:
    at each, all layers pay the same price for one more skipped expert.

    The first-order part of the loss is the texts' own and left out: cuts that counted on it were
    more expensive than one cut for all layers on other documents, cheaper only on the same ones.
    """

    def __init__(self, trace: RoutingTrace, sensitivity: SensitivityProfile) -> None:
        """Read off each layer's curve at the trace's own skipping, and order the segments."""
        self._size = TraceSize.of(trace)
        by_layer = cumulative_shares(trace).transpose(1, 0, 2).reshape(self._size.n_layers, -1)
        self._reached = np.sort(by_layer, axis=1)
        segments = [self._segments(i, sensitivity) for i in range(self._size.n_layers)]
        layers = np.repeat(np.arange(len(segments)), [len(s) for s in segments])
        lengths, slopes = np.concatenate(segments).T
        order = np.argsort(slopes, kind="stable")  # slopes ascend within a layer already
        self._layers, self._lengths = layers[order], lengths[order]
        self._ends = np.cumsum(self._lengths)

    def _segments(self, layer: int, sensitivity: SensitivityProfile) -> NDArray[np.float64]:
        """Return the segments of a layer's hull, [n, 2]: experts skipped, loss per expert."""
        reached = self._reached[layer]
        skipped = len(reached) - np.searchsorted(reached, sensitivity.cuts[::-1])
        points = np.stack([skipped, sensitivity.increase_nats[layer, ::-1]], axis=1)
        return _hull_segments(np.concatenate([[[0.0, 0.0]], points]))

    def table(self, skipped_fraction: float) -> GatingTable:
        """Return the table that skips this fraction of the trace's expert activations."""
        target = self._size.n_dropped(skipped_fraction)
        n_whole = int(np.searchsorted(self._ends, target, side="right"))
        n_layers = self._size.n_layers
        dropped = np.bincount(self._layers[:n_whole], self._lengths[:n_whole], n_layers)
        if n_whole < len(self._ends):
            begun = self._ends[n_whole - 1] if n_whole else 0.0
            dropped[self._layers[n_whole]] += target - begun
        counts = np.rint(dropped).astype(np.int64)
        cuts = [cut_reached_by(self._reached[i], int(counts[i])) for i in range(n_layers)]
        return self._size.table(np.array(cuts))


def _hull_segments(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return length and slope [n, 2] of the lower convex hull of points (x ascending from 0)."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while hull and x == hull[-1][0]:
            y = min(y, hull.pop()[1])
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (x, y)):
            hull.pop()
        hull.append((float(x), float(y)))
    return np.array([(b[0] - a[0], _slope(a, b)) for a, b in pairwise(hull)])


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
