"""`adapmoe`: cuts by the Fisher information of every layer (arXiv 2408.10284, section 4.1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.policies.gating.rule import TraceSize, cumulative_shares, cut_reached_by
from adapmoe_lab.records import OFF, GatingTable, RoutingTrace, SensitivityProfile


class AdapMoERule:
    """AdapMoE's rule at the threshold T that skips the given fraction.

    Keep the smallest m with (1 - W_m)^2 S_l <= T, that is W_m >= 1 - sqrt(T / S_l)
    (arXiv 2408.10284, section 4.1; any K).
    """

    def __init__(self, trace: RoutingTrace, sensitivity: SensitivityProfile) -> None:
        """Sort the penalties of the trace's tokens under the Fisher information of each layer."""
        self._size = TraceSize.of(trace)
        self._fisher = sensitivity.fisher
        penalty = (1 - cumulative_shares(trace)) ** 2 * self._fisher[None, :, None]
        self._reached = np.sort(-penalty, axis=None)

    def table(self, skipped_fraction: float) -> GatingTable:
        """Return the table that skips this fraction of the trace's expert activations."""
        threshold = -cut_reached_by(self._reached, self._size.n_dropped(skipped_fraction))
        if threshold < 0:
            return self._size.table(np.full(self._size.n_layers, OFF))
        return self._size.table(adapmoe_cut(threshold, self._fisher))


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
