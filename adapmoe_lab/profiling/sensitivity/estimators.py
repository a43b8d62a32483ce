"""How the loss increase of a skipped expert is estimated from one backward pass.

With g = dL/dy the gradient of the summed loss at a layer's expert output y, and dy what skipping
changes there, a token's loss changes by about g . dy + (g . dy)^2 / 2: the curvature of a
log-likelihood is the expected square of its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Dropped = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class SkipEffects:
    """What each expert gives T tokens of one layer, and so what dropping it would change.

    The parts of a change are, for each of the K choices, what is lost by dropping it (its weighted
    output less that of its surrogate), and then the K weighted outputs themselves.

    Attributes:
        weights: float64 [T, K], of the router.
        along: float64 [T, 2K], each part's product with the loss gradient.
        products: float64 [T, 2K, 2K], of the parts with each other.
        width: D, channels of the output.
        gain: how much of the dropped share goes to the experts kept; 1 renormalises.
    """

    weights: Floats
    along: Floats
    products: Floats
    width: int
    gain: float

    def change(self, dropped: Dropped) -> Floats:
        """Return how often dropping [T, K] adds each part to the output, float64 [T, 2K]."""
        lost = (self.weights * dropped).sum(axis=1, keepdims=True)
        kept = (self.weights * ~dropped).sum(axis=1, keepdims=True)
        grown = np.where(dropped, 0.0, self.gain * lost / kept)
        return np.concatenate([-dropped.astype(np.float64), grown], axis=1)

    def first_order(self, dropped: Dropped) -> Floats:
        """Return the change's product with the loss gradient, float64 [T]."""
        return (self.change(dropped) * self.along).sum(axis=1)


def _squared_lost_share(effects: SkipEffects, dropped: Dropped) -> Floats:
    return ((effects.weights * dropped).sum(axis=1) / effects.weights.sum(axis=1)) ** 2


def _squared_change(effects: SkipEffects, dropped: Dropped) -> Floats:
    change = effects.change(dropped)
    return np.einsum("tp,tpq,tq->t", change, effects.products, change) / (2 * effects.width)


def _directional(effects: SkipEffects, dropped: Dropped) -> Floats:
    return 0.5 * effects.first_order(dropped) ** 2


def _second_order(effects: SkipEffects, dropped: Dropped) -> Floats:
    first = effects.first_order(dropped)
    return first + 0.5 * first**2


@dataclass(frozen=True)
class Estimator:
    """One way to turn gradients and changes into an expected loss increase.

    Attributes:
        meaning: what the estimate is, in a few words.
        of_tokens: float64 [T], each token's term, from the effects and what is dropped.
        times_fisher: whether the mean of those terms is multiplied by the layer's mean ||g||^2.
    """

    meaning: str
    of_tokens: Callable[[SkipEffects, Dropped], Floats]
    times_fisher: bool = False


ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        "fisher": Estimator(
            "Fisher information x (share dropped)^2, AdapMoE's", _squared_lost_share, True
        ),
        "fisher-change": Estimator(
            "Fisher information x mean squared change of the output", _squared_change, True
        ),
        "directional": Estimator("mean (gradient . change)^2 / 2", _directional),
        "second-order": Estimator(
            "mean gradient . change + (gradient . change)^2 / 2", _second_order
        ),
    }
)
"""Estimators by name; all come from one backward pass."""

MEASURED: Mapping[str, str] = MappingProxyType(
    {
        "ablation": "loss increase of the texts' own next tokens",
        "divergence": "divergence of the next-token distribution from the ungated one",
    }
)
"""Sensitivities that are measured with one layer skipping at a time, and what is measured."""

OF_ALL = frozenset({"second-order", "ablation"})
"""Those that estimate all of the increase; the others leave out its first-order part."""
