"""What is read from measured losses: ratios and their errors, against numpy and repeated draws."""

import numpy as np
import pytest

from adapmoe_lab.profiling.loss_change import LossChanges

DIVERGENCE = np.array([0.001, 0.003, 0.006, 0.02])


def changes(loss, divergence, n_predicted):
    n_predicted = np.asarray(n_predicted)
    summed = (per_token * n_predicted[:, None] for per_token in (loss, divergence))
    return LossChanges(*summed, n_predicted, np.zeros(np.shape(loss)))


def drawn(rng, n_texts=40, n_tokens=500):
    """Texts whose losses scatter about a falling ratio as log-probabilities of tokens do."""
    ratio = 2.0 - 0.3 * np.log(DIVERGENCE / DIVERGENCE[0])
    noise = rng.normal(size=(n_texts, 1)) + 0.7 * rng.normal(size=(n_texts, len(DIVERGENCE)))
    loss = ratio * DIVERGENCE + np.sqrt(2 * DIVERGENCE / n_tokens) * noise
    divergence = DIVERGENCE * rng.uniform(0.8, 1.2, size=(n_texts, 1))
    return changes(loss, divergence, np.full(n_texts, n_tokens))


def test_excess_is_numpys_weighted_line_through_the_ratios():
    rng = np.random.default_rng(0)
    loss, divergence = rng.normal(0.004, 0.01, (9, 4)), rng.uniform(0.5, 2, (9, 4)) * DIVERGENCE
    n_predicted = rng.integers(50, 500, 9)
    found, _ = changes(loss, divergence, n_predicted).excess
    weights = n_predicted / n_predicted.sum()
    mean_loss, mean = weights @ loss, weights @ divergence
    line = np.polyfit(np.log(mean), mean_loss / mean, 1, w=np.sqrt(mean))
    np.testing.assert_allclose(found, np.polyval(line, np.log(mean)), rtol=1e-9)


def test_errors_of_the_excess_are_those_of_repeated_draws():
    rng = np.random.default_rng(1)
    found, errors = zip(*(drawn(rng).excess for _ in range(400)), strict=True)
    truth = 2.0 - 0.3 * np.log(DIVERGENCE / DIVERGENCE[0])
    spread = np.std(found, axis=0)
    np.testing.assert_allclose(np.mean(found, axis=0), truth, atol=4 * spread.max() / 20)
    np.testing.assert_allclose(np.mean(errors, axis=0), spread, rtol=0.12)


def test_the_line_is_surer_than_the_ratio_alone_where_little_is_skipped():
    some = drawn(np.random.default_rng(2))
    _, alone = some.of_tables(slice(1)).excess
    assert some.excess[1][0] < 0.8 * alone[0]


@pytest.mark.parametrize("n_tables", [1, 3])
def test_tables_alike_share_one_ratio(n_tables):
    loss = np.array([[0.002], [0.006]]).repeat(n_tables, axis=1)
    found, errors = changes(loss, np.full(loss.shape, 0.002), [100, 100]).excess
    assert found == pytest.approx(np.full(n_tables, 2.0))
    assert errors == pytest.approx(np.full(n_tables, 1.0))


def test_a_table_that_skips_nothing_has_no_weight():
    divergence = np.array([[0.0, 0.001, 0.004]] * 2)
    found, _ = changes(1.5 * divergence, divergence, [100, 100]).excess
    assert found == pytest.approx(np.full(3, 1.5))
