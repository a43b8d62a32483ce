"""Whether two orders agree, against scipy, every order there is, and limits."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from adapmoe_lab.simulation.statistics.rank_agreement import (
    random_order_band,
    rank_correlation,
    repeatability,
)

FEW_VALUES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=20)


@given(
    FEW_VALUES.filter(
        lambda pairs: all(len(set(column)) > 1 for column in zip(*pairs, strict=True))
    )
)
def test_rank_correlation_is_scipys_ties_and_all(pairs):
    a, b = np.array(pairs).T
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_rank_correlation_looks_at_the_order_alone():
    values = np.array([3.0, -1.0, 0.5, 40.0])
    assert rank_correlation(values, np.exp(values)) == pytest.approx(1)
    assert rank_correlation(values, -(values**3)) == pytest.approx(-1)


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], [1.0, np.nan, 2.0]])
def test_without_an_order_there_is_no_rank_correlation(values):
    assert np.isnan(rank_correlation(values, np.arange(len(values))))


def test_random_orders_leave_the_band_as_rarely_as_it_says():
    """At n = 7 over all 5,040 orders; the tabulated critical value at 5 % is 0.786 (Zar 1972)."""
    band = random_order_band(7)
    orders = itertools.permutations(range(7))
    every = np.array([rank_correlation(np.arange(7), order) for order in orders])
    assert band.mean == pytest.approx(0, abs=0.01)
    assert 0.03 < band.outside(every).mean() <= 0.05
    assert band.outside([-0.786, -0.714, 0.0, 0.714, 0.786]).tolist() == [1, 0, 0, 0, 1]


def test_an_estimate_repeats_as_well_as_its_errors_allow():
    costs = np.arange(8.0)
    assert repeatability(costs, np.zeros(8)) == pytest.approx(1)
    assert repeatability(costs, np.full(8, 100.0)) == pytest.approx(0, abs=0.1)
    assert 0.7 < repeatability(costs, np.full(8, 1.0)) < 0.95
    assert np.isnan(repeatability(costs, np.full(8, np.nan)))
