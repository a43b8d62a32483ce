"""What chance alone would give at the same sample size, so that a reader sees what is signal.

The first null is a uniform router: every token takes K of the E experts without replacement, all
sets equally likely, independently of every other token. The second, for what routing tells of the
kind of a text, deals the labels out anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.simulation.statistics.routing_patterns import counts_by_label, label_information

COVERAGE = 0.95
Z_COVERAGE = 1.959964
"""Standard deviations either side of the mean that cover it."""
N_DRAWS = 200

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Band:
    """Where a quantity lies by chance.

    Attributes:
        mean: its expected value; one, or one per place.
        low: lower end of the range that holds it 95 times in 100.
        high: upper end.
    """

    mean: Values
    low: Values
    high: Values

    def outside(self, values: ArrayLike) -> NDArray[np.bool_]:
        """Return which values chance does not explain; by chance alone, 5 in 100 at most."""
        values = np.asarray(values, dtype=np.float64)
        return (values < self.low) | (values > self.high)

    def over(self, n: float) -> Band:
        """Return the band of the quantity divided by `n`."""
        return Band(self.mean / n, self.low / n, self.high / n)

    @classmethod
    def of_draws(cls, draws: NDArray[np.floating]) -> Band:
        """Return the band of simulated values, draws along the first axis."""
        tail = (1 - COVERAGE) / 2
        low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
        return cls(draws.mean(axis=0, dtype=np.float64), low, high)


def choose_uniformly(
    rng: np.random.Generator, n_tokens: int, n_experts: int, top_k: int
) -> NDArray[np.int64]:
    """Return K of E experts for every token, all sets equally likely, int64 [T, K].

    Floyd's algorithm: expert number j enters if the draw from 0..j is taken already.
    """
    chosen = np.empty((n_tokens, top_k), dtype=np.int64)
    for k, last in enumerate(range(n_experts - top_k, n_experts)):
        draw = rng.integers(0, last + 1, n_tokens)
        taken = (chosen[:, :k] == draw[:, None]).any(axis=1)
        chosen[:, k] = np.where(taken, last, draw)
    return chosen


def binomial_band(n: int, probability: ArrayLike) -> Band:
    """Return the band of the number of n independent events that happen; exact.

    `probability` is one, or one per place; the tails outside hold at most 2.5 % each. Takes steps
    in proportion to the largest expected number.
    """
    p = np.clip(np.asarray(probability, dtype=np.float64), 1e-300, 1 - 1e-12)
    tail = (1 - COVERAGE) / 2
    low, high = np.zeros(p.shape), np.zeros(p.shape)
    log_odds = np.log(p) - np.log1p(-p)
    log_mass = n * np.log1p(-p)
    below = np.zeros(p.shape)  # P(count < k)
    for k in range(n + 1):
        below += np.exp(log_mass)  # now P(count <= k)
        low += below < tail
        high += below < 1 - tail
        if (below >= 1 - tail).all():
            break
        log_mass = log_mass + np.log((n - k) / (k + 1)) + log_odds
    return Band(n * np.asarray(probability, dtype=np.float64), low, high)


def use_band(n_tokens: int, n_experts: int, top_k: int) -> Band:
    """Return the band of one expert's use, the fraction of tokens routed to it; exact."""
    return binomial_band(n_tokens, top_k / n_experts).over(n_tokens)


def pair_band(n_tokens: int, n_experts: int, top_k: int) -> Band:
    """Return the band of the number of tokens that use both experts of one pair; exact."""
    return binomial_band(n_tokens, top_k * (top_k - 1) / (n_experts * (n_experts - 1)))


def locality_band(n_pairs: ArrayLike, n_experts: int, top_k: int) -> Band:
    """Return the band of locality over a number of token pairs; normal approximation.

    Whatever one token used, the number of its experts that the next repeats is hypergeometric, so
    the repeats of successive tokens are independent and their variances add up.
    """
    mean = top_k / n_experts
    one_pair = mean * (1 - mean) * (n_experts - top_k) / max(1, n_experts - 1) / top_k
    reach = Z_COVERAGE * np.sqrt(one_pair / np.asarray(n_pairs, dtype=np.float64))
    return Band(
        np.full(reach.shape, mean), np.maximum(mean - reach, 0), np.minimum(mean + reach, 1)
    )


def information_band(
    n_tokens_by_label: Sequence[int],
    n_experts: int,
    top_k: int,
    *,
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> Band:
    """Return the band of the information in bits that an expert gives about a label; simulated.

    Its mean is the bias of `label_information` at this sample size: a uniform router tells
    nothing.
    """
    n_labels, rng = len(n_tokens_by_label), np.random.default_rng(seed)
    labels = np.repeat(np.arange(n_labels), n_tokens_by_label)[:, None]
    draws = np.empty(n_draws)
    for draw in range(n_draws):
        cells = labels * n_experts + choose_uniformly(rng, len(labels), n_experts, top_k)
        counts = np.bincount(cells.ravel(), minlength=n_labels * n_experts)
        draws[draw] = label_information(counts.reshape(n_labels, n_experts))
    return Band.of_draws(draws)


def shuffled_counts(
    by_sequence: NDArray[np.integer],
    labels: ArrayLike,
    n_labels: int,
    *,
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Return counts by label with the labels dealt out anew, float64 [R, L, D, E].

    A sequence stays whole, so what its tokens share for being one text is kept: what the labels
    tell beyond this is about the kind of text. Arguments as for `counts_by_label`.
    """
    labels, rng = np.asarray(labels), np.random.default_rng(seed)
    dealt = [rng.permutation(labels) for _ in range(n_draws)]
    return np.stack([counts_by_label(by_sequence, anew, n_labels) for anew in dealt])
