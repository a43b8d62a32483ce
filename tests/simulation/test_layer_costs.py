"""Costs at an equal skip and their shares, against formulas and simulation."""

from dataclasses import replace

import numpy as np
import pytest
from traces import make_sensitivity, make_spec

from adapmoe_lab.simulation.statistics.layer_costs import layer_costs, shares_of_total


def test_layers_are_compared_at_an_equal_skip_and_without_correction():
    spec = make_spec()
    plain = make_sensitivity(spec)
    uneven = np.array(plain.skipped)
    uneven[2] *= np.linspace(1, 0.5, 33)  # layer 2 is less sure: the same skip needs a lower cut
    profile = replace(
        plain, skipped=uneven, anchors=np.array([[1.0, 3.0, 0.1]]), factor=[2.0], joint_error=[1.1]
    )
    costs, errors = layer_costs(profile, 0.25)
    assert costs[:2] == pytest.approx(0.01 * np.array([9.0, 3.0]) * 0.25**2)
    assert errors == pytest.approx(costs / 10)
    assert costs[2] > 1.2 * 0.01 * 0.25**2
    at_cut = np.interp(0.25, uneven[2, ::-1], plain.cuts[::-1])
    assert costs[2] == pytest.approx(np.interp(at_cut, plain.cuts, plain.increase_nats[2]))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 0.51])
def test_a_skip_that_no_layer_can_make_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"above 0 and at most 0\.5, .* got {fraction:g}"):
        layer_costs(make_sensitivity(), fraction)


def test_errors_of_shares_are_those_of_repeated_draws():
    costs, errors = np.array([5.0, 3.0, 1.0, 1.0]), np.array([0.2, 0.05, 0.1, 0.0])
    shares, share_errors = shares_of_total(costs, errors)
    assert shares == pytest.approx(costs / 10)
    draws = np.random.default_rng(0).normal(costs, errors, (20_000, 4))
    drawn = (draws / draws.sum(axis=1, keepdims=True)).std(axis=0)
    assert share_errors == pytest.approx(drawn, rel=0.03)


def test_without_a_total_there_are_no_shares():
    for values in shares_of_total(np.array([1.0, -2.0]), np.array([0.1, 0.1])):
        assert np.isnan(values).all()
