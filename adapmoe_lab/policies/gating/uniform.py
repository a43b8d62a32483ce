"""`uniform`: one cut for all layers."""

from __future__ import annotations

import numpy as np

from adapmoe_lab.policies.gating.rule import TraceSize, cumulative_shares, cut_reached_by
from adapmoe_lab.records import GatingTable, RoutingTrace, SensitivityProfile


class UniformCut:
    """One cut on the cumulative share for all layers.

    With a single cut a token skips one expert for every m < K whose cumulative share reaches it,
    so the skipped fraction is the survival function of all cumulative shares.
    """

    def __init__(self, trace: RoutingTrace, _: SensitivityProfile | None = None) -> None:
        """Sort the trace's cumulative shares."""
        self._size = TraceSize.of(trace)
        self._reached = np.sort(cumulative_shares(trace), axis=None)

    def table(self, skipped_fraction: float) -> GatingTable:
        """Return the table that skips this fraction of the trace's expert activations."""
        cut = cut_reached_by(self._reached, self._size.n_dropped(skipped_fraction))
        return self._size.table(np.full(self._size.n_layers, cut))
