"""Policies that the package does not know, each as its users would write one."""

from __future__ import annotations

import numpy as np

from adapmoe_lab.policies.eviction.policy import EvictionPolicy
from adapmoe_lab.policies.gating.rule import TraceSize, cumulative_shares, cut_reached_by

LATEST = 2**60


def time_left(clock):
    """Return what is left of time, twice the clock: policies may call functions of their own."""
    return LATEST - 2 * clock


def after_use(_, state, use):
    """Return the time that is left after the use: of one step, hits come before misses."""
    return time_left(use.clock) - 1 + use.was_resident, state


TOY = EvictionPolicy("toy", after_use)
"""The most recently used expert leaves first."""


class SameInEveryLayer:
    """A gating rule under which every layer skips the same fraction of its activations."""

    def __init__(self, trace, _):
        """Sort the shares of every layer's tokens."""
        self._size = TraceSize.of(trace)
        by_layer = cumulative_shares(trace).transpose(1, 0, 2).reshape(self._size.n_layers, -1)
        self._reached = np.sort(by_layer, axis=1)

    def table(self, skipped_fraction):
        """Return the table that skips this fraction of the trace's expert activations."""
        n_dropped = round(self._size.n_dropped(skipped_fraction) / self._size.n_layers)
        cuts = [cut_reached_by(reached, n_dropped) for reached in self._reached]
        return self._size.table(np.array(cuts))
