"""How far two orders agree, beside what chance and their own errors let expect."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.simulation.statistics.chance import N_DRAWS, Band

Floats = NDArray[np.float64]


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Return Spearman's rank correlation of two series [n]; ties share the mean of their ranks.

    NaN if there is no order: fewer than two values, all of them equal, or one not finite.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("nan")
    first, second = (_ranks(values) - (len(values) - 1) / 2 for values in (first, second))
    spread = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / spread) if spread > 0 else float("nan")


def _ranks(values: Floats) -> Floats:
    below = (values[:, None] > values[None, :]).sum(axis=1)
    return below + ((values[:, None] == values[None, :]).sum(axis=1) - 1) / 2


def random_order_band(n: int, *, n_draws: int = 20_000, seed: int = 0) -> Band:
    """Return where the rank correlation of n different values in random order lies; simulated."""
    ranks = np.arange(n)
    shuffled = np.random.default_rng(seed).permuted(np.tile(ranks, (n_draws, 1)), axis=1)
    squares = ((shuffled - ranks) ** 2).sum(axis=1)
    return Band.of_draws(1 - 6 * squares / max(1, n * (n**2 - 1)))


def repeatability(
    values: Floats, errors: Floats, *, n_draws: int = N_DRAWS, seed: int = 0
) -> float:
    """Return the mean rank correlation of two repeats of an estimate [n]; simulated.

    Each repeat moves the values by independent normal errors of the given size. What repeats badly
    says little about an order, however right it is on average. NaN without errors, as from a single
    text.
    """
    if not np.isfinite(errors).all():
        return float("nan")
    rng = np.random.default_rng(seed)
    first, second = rng.normal(values, errors, (2, n_draws, len(values)))
    return float(np.mean([rank_correlation(*pair) for pair in zip(first, second, strict=True)]))
