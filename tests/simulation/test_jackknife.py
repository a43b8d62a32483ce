"""Standard errors over texts, against repeated draws."""

import numpy as np
import pytest

from adapmoe_lab.simulation.statistics.jackknife import jackknife


def test_errors_are_those_of_repeated_draws():
    rng = np.random.default_rng(0)
    n_tokens = rng.integers(50, 500, 40)

    def ratio(weights, values):
        return (weights @ values[0]) / (weights @ values[1])

    found, errors = [], []
    for _ in range(400):
        below = rng.uniform(0.8, 1.2, 40)
        values = np.stack([below + rng.normal(0, 3, 40) / np.sqrt(n_tokens), below])
        value, error = jackknife(lambda w, v=values: ratio(w, v), n_tokens)
        found.append(value)
        errors.append(error)
    assert np.mean(found) == pytest.approx(1.0, abs=4 * np.std(found) / 20)
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.1)
