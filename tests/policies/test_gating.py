import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from traces import make_spec, make_trace

from adapmoe_lab.policies.gating import (
    adapmoe_cut,
    adapmoe_cuts,
    curve_cuts,
    gated_weights,
    keep_by_cuts,
    kept_experts,
    uniform_cuts,
)
from adapmoe_lab.records import OFF, GatingTable, SensitivityProfile

weights_arrays = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 5)),
    elements=st.floats(1 / 128, 1, width=32),
)


def keep_by_definition(weights, cuts):
    """Keep the smallest m best experts whose cumulative share reaches cuts[m-1]."""
    keep = np.zeros(weights.shape, dtype=bool)
    for token, row in enumerate(weights):
        total = np.float32(0)
        for w in row:
            total = np.float32(total + w)
        shares = [np.float32(w / total) for w in row]
        ranked = sorted(range(len(row)), key=lambda k: (-shares[k], k))
        cumulative = np.float32(0)
        for n_kept, k in enumerate(ranked, start=1):
            keep[token, k] = True
            cumulative = np.float32(cumulative + shares[k])
            if n_kept < len(row) and cumulative >= np.float32(cuts[n_kept - 1]) - 1e-6:
                break
    return keep


@given(weights_arrays, st.lists(st.floats(0.05, 1.2), min_size=4, max_size=4))
def test_equals_the_definition_away_from_ties(weights, cuts):
    row = np.float32(cuts[: weights.shape[1] - 1])
    shares = -np.sort(-weights / weights.sum(axis=1, keepdims=True), axis=1)
    cumulative = np.cumsum(shares, axis=1)[:, :-1]
    if row.size and np.abs(cumulative - row).min() < 1e-5:
        return
    np.testing.assert_array_equal(keep_by_cuts(weights, row), keep_by_definition(weights, row))


@given(weights_arrays, st.floats(0, 2))
def test_numpy_and_torch_agree_to_the_last_bit(weights, cut):
    row = np.full(weights.shape[1] - 1, cut, dtype=np.float32)
    from_torch = keep_by_cuts(torch.from_numpy(weights.copy()), row)
    np.testing.assert_array_equal(keep_by_cuts(weights, row), from_torch.numpy())


@given(weights_arrays, st.floats(0, 2))
def test_at_least_one_is_kept_and_never_a_smaller_share_over_a_larger(weights, cut):
    keep = keep_by_cuts(weights, np.full(weights.shape[1] - 1, cut, dtype=np.float32))
    assert keep.any(axis=1).all()
    for kept, row in zip(keep, weights, strict=True):
        if not kept.all():
            assert row[kept].min() >= row[~kept].max()


def test_order_of_columns_does_not_matter():
    weights = np.array([[0.1, 0.5, 0.25, 0.15]], dtype=np.float32)
    cuts = np.array([0.8, 0.7, 0.8], dtype=np.float32)
    expected = {0.5, 0.25}
    for order in itertools.permutations(range(4)):
        shuffled = weights[:, order]
        kept = shuffled[keep_by_cuts(shuffled, cuts)]
        assert {round(float(w), 2) for w in kept} == expected


def test_share_counts_not_the_weight():
    weights = np.array([[1.75, 0.75]], dtype=np.float32)  # sums to 2.5: shares .7 and .3
    assert keep_by_cuts(weights, [0.71]).tolist() == [[True, True]]
    assert keep_by_cuts(weights, [0.69]).tolist() == [[True, False]]


def test_off_skips_nothing():
    trace = make_trace()
    table = GatingTable.per_layer(np.full(3, OFF), top_k=2)
    assert kept_experts(trace, table).all()


def test_renormalising_preserves_the_sum():
    weights = np.array([[1.75, 0.75], [1.0, 1.5]], dtype=np.float32)
    keep = np.array([[True, False], [True, True]])
    scaled = gated_weights(weights, keep, renormalise=True)
    np.testing.assert_allclose(scaled.sum(axis=1), weights.sum(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(gated_weights(weights, keep, renormalise=False)[0], [1.75, 0])


def sensitivity_of(cost):
    cost = np.asarray(cost, dtype=float)
    grid = np.linspace(0.5, 1.0, 33)
    increase = cost[:, None] * (1 - grid) ** 2 * 0.01
    return SensitivityProfile(
        "x", "fisher", cost, cost * 0, 100, 2, grid, increase, np.zeros_like(increase)
    )


@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.4])
def test_every_rule_meets_the_skipped_fraction(fraction, top_k):
    trace = make_trace(make_spec(top_k=top_k), n_tokens=1000)
    sensitivity = sensitivity_of([9.0, 3.0, 1.0])
    if top_k == 4:
        grid = np.linspace(0.25, 1.0, 33)
        values = {n: getattr(sensitivity, n) for n in sensitivity.__dataclass_fields__}
        sensitivity = SensitivityProfile(**{**values, "cuts": grid})
    for table in (
        uniform_cuts(trace, fraction),
        adapmoe_cuts(trace, sensitivity, fraction),
        curve_cuts(trace, sensitivity, fraction),
    ):
        skipped = 1 - kept_experts(trace, table).mean()
        assert skipped == pytest.approx(fraction, abs=0.003)


def test_impossible_fraction_is_refused():
    with pytest.raises(ValueError, match=r"must lie in 0\.\.0\.5 for top-2 .*got 0\.6"):
        uniform_cuts(make_trace(), 0.6)


def test_adapmoe_rule_is_its_formula():
    sensitivity = np.array([46.7, 1.0, 0.02])
    cuts = adapmoe_cut(0.005, sensitivity)
    shares = np.linspace(0.5, 1, 1001)
    for cut, s in zip(cuts, sensitivity, strict=True):
        np.testing.assert_array_equal(shares >= cut, (1 - shares) ** 2 * s <= 0.005)
    assert (adapmoe_cut(0.0, sensitivity) == OFF).all()


def test_curve_rule_spends_where_it_costs_least():
    trace = make_trace(n_tokens=2000)
    sensitivity = sensitivity_of([9.0, 3.0, 1.0])
    curve = sensitivity.increase(curve_cuts(trace, sensitivity, 0.2).cuts[:, 0])[0].sum()
    uniform = sensitivity.increase(uniform_cuts(trace, 0.2).cuts[:, 0])[0].sum()
    assert curve < uniform
