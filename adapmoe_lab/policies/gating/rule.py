"""What a gating rule is, and what rules share: the shares of a trace, and cuts made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records import OFF, GatingTable, RoutingTrace
from adapmoe_lab.records.arguments import finite_number
from adapmoe_lab.records.spec import max_skipped_fraction

MARGIN = 1e-6
"""How far below the smallest value a cut lies that everything is to reach."""


class Rule(Protocol):
    """A way to spread skipping over layers, prepared for one trace."""

    def table(self, skipped_fraction: float) -> GatingTable:
        """Return the table that skips this fraction of the trace's expert activations."""
        ...


def check_skipped_fraction(skipped_fraction: float, top_k: int) -> None:
    """Raise ValueError if no number, or more than can be skipped with one expert kept."""
    limit = max_skipped_fraction(top_k)
    if not 0 <= finite_number("skipped_fraction", skipped_fraction) <= limit:
        raise ValueError(
            f"skipped_fraction must lie in 0..{limit:g} for top-{top_k} routing (one "
            f"expert is always kept), got {skipped_fraction:g}."
        )


def cumulative_shares(trace: RoutingTrace) -> NDArray[np.float64]:
    """Return the share held by the best m experts, m = 1..K-1, float64 [T, L, K-1]."""
    ranked = -np.sort(-trace.shares.astype(np.float64), axis=2)
    return np.cumsum(ranked, axis=2)[:, :, :-1]


@dataclass(frozen=True)
class TraceSize:
    """The dimensions of a trace that a rule needs once it is prepared.

    Attributes:
        n_activations: T L K, expert activations of the trace.
        n_layers: L.
        top_k: K.
    """

    n_activations: int
    n_layers: int
    top_k: int

    @classmethod
    def of(cls, trace: RoutingTrace) -> TraceSize:
        """Return the dimensions of a trace."""
        return cls(trace.weights.size, trace.spec.n_layers, trace.spec.top_k)

    def n_dropped(self, skipped_fraction: float) -> int:
        """Return how many activations a fraction of T L K is; see `check_skipped_fraction`."""
        check_skipped_fraction(skipped_fraction, self.top_k)
        return round(skipped_fraction * self.n_activations)

    def table(self, cuts: NDArray[np.float64]) -> GatingTable:
        """Return the table of cuts on the share [L]."""
        return GatingTable.per_layer(cuts, self.top_k)


def cut_reached_by(ascending: NDArray[np.float64], n_dropped: int) -> float:
    """Return the cut that the `n_dropped` largest of the values reach.

    It lies between two neighbouring values, so that rounding cannot move it across one.
    """
    if n_dropped == 0:
        return OFF
    if n_dropped >= len(ascending):
        return float(ascending[0]) - MARGIN
    return float((ascending[-n_dropped] + ascending[-n_dropped - 1]) / 2)
