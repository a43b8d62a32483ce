"""How the cuts of a gating table are chosen for a skipped fraction or a loss budget.

Each rule is prepared once for a trace and then answers in milliseconds, as a slider asks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.records import OFF, GatingTable, RoutingTrace, SensitivityProfile
from adapmoe_lab.records.arguments import finite_number

N_BISECTIONS = 20
MARGIN = 1e-6
"""How far below the smallest value a cut lies that everything is to reach."""


class Rule(Protocol):
    """A way to spread skipping over layers, prepared for one trace."""

    def table(self, skipped_fraction: float) -> GatingTable:
        """Return the table that skips this fraction of the trace's expert activations."""
        ...


class UniformCut:
    """One cut on the cumulative share for all layers.

    With a single cut a token skips one expert for every m < K whose cumulative share reaches it,
    so the skipped fraction is the survival function of all cumulative shares.
    """

    def __init__(self, trace: RoutingTrace, _: SensitivityProfile | None = None) -> None:
        """Sort the trace's cumulative shares."""
        self._size = _Size.of(trace)
        self._reached = np.sort(cumulative_shares(trace), axis=None)

    def table(self, skipped_fraction: float) -> GatingTable:
        """Return the table that skips this fraction of the trace's expert activations."""
        cut = _cut_reached_by(self._reached, self._size.n_dropped(skipped_fraction))
        return self._size.table(np.full(self._size.n_layers, cut))


class AdapMoERule:
    """AdapMoE's rule at the threshold T that skips the given fraction.

    Keep the smallest m with (1 - W_m)^2 S_l <= T, that is W_m >= 1 - sqrt(T / S_l)
    (arXiv 2408.10284, section 4.1; any K).
    """

    def __init__(self, trace: RoutingTrace, sensitivity: SensitivityProfile) -> None:
        """Sort the penalties of the trace's tokens under the Fisher information of each layer."""
        self._size = _Size.of(trace)
        self._fisher = sensitivity.fisher
        penalty = (1 - cumulative_shares(trace)) ** 2 * self._fisher[None, :, None]
        self._reached = np.sort(-penalty, axis=None)

    def table(self, skipped_fraction: float) -> GatingTable:
        """Return the table that skips this fraction of the trace's expert activations."""
        threshold = -_cut_reached_by(self._reached, self._size.n_dropped(skipped_fraction))
        if threshold < 0:
            return self._size.table(np.full(self._size.n_layers, OFF))
        return self._size.table(adapmoe_cut(threshold, self._fisher))


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
        self._size = _Size.of(trace)
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
        cuts = [_cut_reached_by(self._reached[i], int(counts[i])) for i in range(n_layers)]
        return self._size.table(np.array(cuts))


RULES: Mapping[str, Callable[[RoutingTrace, SensitivityProfile], Rule]] = MappingProxyType(
    {"uniform": UniformCut, "adapmoe": AdapMoERule, "curve": LeastLoss}
)
"""Rules by the name that `tune` and the workbench know them by."""


def largest_skipped_fraction(
    rule: Rule, sensitivity: SensitivityProfile, top_k: int, max_loss_increase_nats: float
) -> float:
    """Return the largest skipped fraction whose predicted loss increase is allowed."""
    low, high = 0.0, (top_k - 1) / top_k
    for _ in range(N_BISECTIONS):
        middle = (low + high) / 2
        predicted, _ = sensitivity.total_increase(rule.table(middle).cuts[:, 0])
        allowed = predicted <= max_loss_increase_nats
        low, high = (middle, high) if allowed else (low, middle)
    return low


def check_method(method: str) -> None:
    """Raise ValueError unless a rule has this name."""
    if method not in RULES:
        raise ValueError(f"method={method!r} is unknown; expected one of {', '.join(RULES)}.")


def check_skipped_fraction(skipped_fraction: float, top_k: int) -> None:
    """Raise ValueError if no number, or more than can be skipped with one expert kept."""
    limit = (top_k - 1) / top_k
    if not 0 <= finite_number("skipped_fraction", skipped_fraction) <= limit:
        raise ValueError(
            f"skipped_fraction must lie in 0..{limit:g} for top-{top_k} routing (one "
            f"expert is always kept), got {skipped_fraction:g}."
        )


def adapmoe_cut(threshold: float, sensitivity: ArrayLike) -> NDArray[np.float64]:
    """Cuts on the share [L] of AdapMoE's rule for one threshold T; T = 0 skips nothing."""
    sensitivity = np.asarray(sensitivity, dtype=np.float64)
    if threshold == 0:
        return np.full(sensitivity.shape, OFF)
    return np.maximum(0.0, 1 - np.sqrt(threshold / np.maximum(sensitivity, 1e-300)))


def single_expert_layers(cuts: ArrayLike, top_k: int = 2) -> NDArray[np.bool_]:
    """Return the layers [L] in which a cut on the share [L] leaves every token one expert.

    The best of K shares is at least 1/K, so a cut that is no higher is always reached. Under
    AdapMoE's rule with K = 2 these are the layers with S_l <= 4 T.
    """
    return np.asarray(cuts, dtype=np.float64) <= 1 / top_k


def cumulative_shares(trace: RoutingTrace) -> NDArray[np.float64]:
    """Return the share held by the best m experts, m = 1..K-1, float64 [T, L, K-1]."""
    ranked = -np.sort(-trace.shares.astype(np.float64), axis=2)
    return np.cumsum(ranked, axis=2)[:, :, :-1]


class _Size:
    """The dimensions of a trace that a rule needs once it is prepared."""

    def __init__(self, n_activations: int, n_layers: int, top_k: int) -> None:
        self.n_activations, self.n_layers, self.top_k = n_activations, n_layers, top_k

    @classmethod
    def of(cls, trace: RoutingTrace) -> _Size:
        return cls(trace.weights.size, trace.spec.n_layers, trace.spec.top_k)

    def n_dropped(self, skipped_fraction: float) -> int:
        """Return how many activations a fraction of T L K is; see `check_skipped_fraction`."""
        check_skipped_fraction(skipped_fraction, self.top_k)
        return round(skipped_fraction * self.n_activations)

    def table(self, cuts: NDArray[np.float64]) -> GatingTable:
        return GatingTable.per_layer(cuts, self.top_k)


def _cut_reached_by(ascending: NDArray[np.float64], n_dropped: int) -> float:
    """Return the cut that the `n_dropped` largest of the values reach.

    It lies between two neighbouring values, so that rounding cannot move it across one.
    """
    if n_dropped == 0:
        return OFF
    if n_dropped >= len(ascending):
        return float(ascending[0]) - MARGIN
    return float((ascending[-n_dropped] + ascending[-n_dropped - 1]) / 2)


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
