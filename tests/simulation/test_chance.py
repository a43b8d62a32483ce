"""What a uniform router gives, against exact enumeration and against routing by it."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from adapmoe_lab.simulation.statistics.chance import (
    Band,
    binomial_band,
    choose_uniformly,
    information_band,
    locality_band,
    pair_band,
    shuffled_counts,
    use_band,
)
from adapmoe_lab.simulation.statistics.routing_patterns import (
    co_activation,
    counts_by_label,
    expert_use,
    label_information,
    locality,
)


def test_every_set_of_experts_is_equally_likely():
    chosen = choose_uniformly(np.random.default_rng(0), 20_000, 5, 3)
    sets, counts = np.unique(np.sort(chosen, axis=1), axis=0, return_counts=True)
    assert sets.tolist() == [list(c) for c in itertools.combinations(range(5), 3)]
    assert np.abs(counts - 2000).max() < 5 * (20_000 * 0.1 * 0.9) ** 0.5


def exact_quantile(n, p, level):
    below = Fraction(0)
    for k in range(n + 1):
        below += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if below >= level:
            return k
    raise AssertionError("the probabilities do not sum to one")


@pytest.mark.parametrize("n", [1, 7, 60])
def test_binomial_band_is_exact(n):
    chances = [Fraction(*pair) for pair in ((0, 1), (1, 50), (1, 4), (1, 2), (9, 10), (1, 1))]
    band = binomial_band(n, [float(p) for p in chances])
    assert band.mean == pytest.approx([float(n * p) for p in chances])
    assert band.low.tolist() == [exact_quantile(n, p, Fraction(25, 1000)) for p in chances]
    assert band.high.tolist() == [exact_quantile(n, p, Fraction(975, 1000)) for p in chances]


def test_binomial_band_of_many_rare_events_does_not_underflow():
    band = binomial_band(200_000, 0.25)
    reach = 1.96 * (200_000 * 0.25 * 0.75) ** 0.5
    assert (band.low, band.high) == pytest.approx((50_000 - reach, 50_000 + reach), abs=2)


@pytest.mark.parametrize(("n_experts", "top_k"), [(8, 2), (32, 4), (6, 1)])
def test_bands_hold_what_a_uniform_router_does(n_experts, top_k):
    """Many routings by a uniform router: means as promised, 5 % outside at most."""
    rng, n_tokens, n_runs = np.random.default_rng(1), 300, 300
    use, pairs, repeats = [], [], []
    for _ in range(n_runs):
        chosen = choose_uniformly(rng, n_tokens, n_experts, top_k)
        use.append(expert_use(chosen[:, None], n_experts)[0])
        pairs.append(co_activation(chosen, n_experts)[np.triu_indices(n_experts, 1)])
        repeats.append(locality(chosen[:, None], [0, 100])[0])
    promised = {
        "use": (use_band(n_tokens, n_experts, top_k), np.array(use)),
        "locality": (locality_band(n_tokens - 2, n_experts, top_k), np.array(repeats)),
    }
    if top_k > 1:
        promised["pairs"] = (pair_band(n_tokens, n_experts, top_k), np.array(pairs))
    for name, (band, found) in promised.items():
        by_run = found.reshape(n_runs, -1).mean(axis=1)
        error = max(by_run.std() / n_runs**0.5, 1e-12)
        assert found.mean() == pytest.approx(float(band.mean), abs=4 * error), name
        outside = band.outside(found).reshape(n_runs, -1).mean(axis=1)
        slack = 4 * outside.std() / n_runs**0.5
        assert outside.mean() <= 0.05 + slack, name
        assert band.outside(found).any(), name


def test_the_bias_of_information_is_the_known_one():
    """To first order (E - K)(D - 1) / (2 T K) nats: the chi-square law of a K-subset's counts."""
    n_tokens, n_experts, top_k = (700, 900, 1400), 16, 4
    band = information_band(n_tokens, n_experts, top_k, n_draws=400)
    bias = (n_experts - top_k) * 2 / (2 * 3000 * top_k) / math.log(2)
    assert float(band.mean) == pytest.approx(bias, rel=0.05)
    assert 0 < band.low < band.mean < band.high < 2.5 * bias


def test_shuffled_labels_keep_every_text_whole():
    rng = np.random.default_rng(2)
    by_sequence = rng.integers(0, 30, (12, 2, 5))
    labels = np.repeat([0, 1, 2], 4)
    shuffled = shuffled_counts(by_sequence, labels, 3, n_draws=50)
    whole = {tuple(row) for row in by_sequence[:, 0].tolist()}
    sums = {
        tuple(np.sum(rows, axis=0).tolist()) for rows in itertools.combinations(sorted(whole), 4)
    }
    assert all(tuple(row) in sums for draw in shuffled[:, 0] for row in draw.tolist())
    assert np.array_equal(shuffled.sum(axis=2), [by_sequence.sum(axis=0)] * 50)
    assert len({draw.tobytes() for draw in shuffled}) > 40


def test_texts_that_differ_for_other_reasons_are_not_taken_for_kinds():
    """Each text has experts of its own: labels tell a lot, but no more than shuffled ones."""
    rng, labels = np.random.default_rng(3), np.repeat([0, 1], 10)
    habits = rng.dirichlet(np.full(8, 0.5), 20)
    by_sequence = np.stack([rng.multinomial(400, habit) for habit in habits])[:, None]
    found = label_information(counts_by_label(by_sequence, labels, 2))
    shuffled = label_information(shuffled_counts(by_sequence, labels, 2))
    uniform = information_band([4000, 4000], 8, 1)
    assert not Band.of_draws(shuffled).outside(found).any()
    assert uniform.outside(found).all()
