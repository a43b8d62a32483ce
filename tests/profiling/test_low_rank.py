"""Reduced-rank ridge regression against least squares, hat matrices and SVDs of numpy."""

import numpy as np
import pytest
import torch

from adapmoe_lab.profiling.surrogates.low_rank import (
    METRIC_FLOOR,
    RIDGES,
    OutputMetric,
    fit_low_rank,
)

D = 10


def samples(n, seed=0, noise=0.3):
    """Return inputs, outputs and weights of a noisy map whose directions differ in strength."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D)) * np.geomspace(3, 0.1, D) + rng.normal(size=D)
    y = np.tanh(x @ rng.normal(size=(D, D))) + noise * rng.normal(size=(n, D)) + 1
    return x, y, rng.uniform(0.1, 1.0, n)


def metric_of(seed=1):
    gradients = np.random.default_rng(seed).normal(size=(40, D)) * np.geomspace(2, 0.05, D)
    matrix = gradients.T @ gradients / 40
    matrix += METRIC_FLOOR * np.trace(matrix) / D * np.eye(D)
    return OutputMetric.of_gradients(torch.from_numpy(gradients)), matrix


def brute_force(x, y, weights, rank, matrix=None):
    """Return the linear part [D, D] of the best map of a rank, and the objective it reaches.

    The ridge is tried by explicit hat matrices and made rows of the data; the optimum of a rank is
    the projection of the least-squares fit on the leading directions of what it fits.
    """
    shares = weights / weights.sum()
    n_effective = 1 / (shares**2).sum()
    root = np.eye(D) if matrix is None else np.linalg.cholesky(matrix)
    x = (x - shares @ x) * np.sqrt(weights)[:, None]
    y = (y - shares @ y) * np.sqrt(weights)[:, None] @ root
    largest = np.linalg.norm(x, 2) ** 2
    errors = []
    for ridge in RIDGES.numpy() * largest:
        hat = x @ np.linalg.solve(x.T @ x + ridge * np.eye(D), x.T)
        left = n_effective - 1 - np.trace(hat)
        error = np.linalg.norm(y - hat @ y) ** 2 / left**2
        errors.append(error if left >= n_effective / 2 else np.inf)
    ridge = RIDGES.numpy()[np.argmin(errors)] * largest
    x_more = np.concatenate([x, np.sqrt(ridge) * np.eye(D)])
    y_more = np.concatenate([y, np.zeros((D, D))])
    whole = np.linalg.lstsq(x_more, y_more, rcond=None)[0]
    _, _, directions = np.linalg.svd(x_more @ whole)
    best = whole @ directions[:rank].T @ directions[:rank]
    objective = np.linalg.norm(y_more - x_more @ best) ** 2
    return best @ np.linalg.inv(root), objective, np.linalg.norm(y_more) ** 2


@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("n", [7, 25, 400])
@pytest.mark.parametrize("rank", [1, 4, D])
def test_equals_the_brute_force_optimum(n, rank, with_metric):
    """Fewer tokens than channels, a few more, and many."""
    x, y, weights = samples(n)
    metric, matrix = metric_of() if with_metric else (None, None)
    found = fit_low_rank(*map(torch.from_numpy, (x, y, weights)), rank, metric)
    linear, objective, nothing = brute_force(x, y, weights, rank, matrix)
    np.testing.assert_allclose((found.up @ found.down).T.numpy(), linear, rtol=1e-6, atol=1e-8)
    assert float(found.gains.sum()) == pytest.approx(nothing - objective, rel=1e-6)
    shares = weights / weights.sum()
    np.testing.assert_allclose(found.centre.numpy(), shares @ x)


def test_lower_ranks_are_the_first_terms_of_higher_ones():
    x, y, weights = map(torch.from_numpy, samples(60))
    high, low = (fit_low_rank(x, y, weights, rank) for rank in (6, 2))
    torch.testing.assert_close(high.up[:, :2] @ high.down[:2], low.up @ low.down)
    assert (high.gains.diff() <= 0).all()


def test_an_affine_map_is_recovered_exactly():
    rng = np.random.default_rng(0)
    x, matrix, offset = rng.normal(size=(50, D)) + 2, rng.normal(size=(D, D)), rng.normal(size=D)
    y = x @ matrix.T + offset
    found = fit_low_rank(*map(torch.from_numpy, (x, y, rng.uniform(0.1, 1, 50))), D)
    again = found.mean + (torch.from_numpy(x) - found.centre) @ found.down.T @ found.up.T
    np.testing.assert_allclose(again.numpy(), y, atol=1e-5)


def test_noise_alone_is_not_learnt():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 40, D))
    found = fit_low_rank(torch.from_numpy(x), torch.from_numpy(y), torch.ones(40).double(), D)
    learnt = (torch.from_numpy(x) @ found.down.T @ found.up.T).norm()
    least_squares = np.linalg.norm(x @ np.linalg.lstsq(x, y, rcond=None)[0])
    assert learnt < 0.5 * least_squares
    assert found.mean.norm() < 0.5 * np.linalg.norm(y.mean(axis=0))


@pytest.mark.parametrize("n", [0, 1])
def test_of_no_token_or_one_nothing_is_concluded(n):
    x, y, weights = (torch.from_numpy(array[:n]) for array in samples(5))
    found = fit_low_rank(x, y, weights, 3)
    for tensor in (found.mean, found.down, found.up, found.gains):
        assert not tensor.any()
    assert found.down.shape == (3, D)
    assert found.up.shape == (D, 3)


def test_of_three_tokens_at_most_a_mean_is_concluded():
    x, y, weights = (torch.from_numpy(array) for array in samples(3, noise=0.0))
    found = fit_low_rank(x, y, weights, 3)
    assert float((found.up @ found.down).norm()) < 1e-3
    plain = (weights / weights.sum()) @ y
    assert 0 < float(found.mean.norm()) < float(plain.norm())
    torch.testing.assert_close(found.mean / found.mean.norm(), plain / plain.norm())
