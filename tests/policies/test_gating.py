import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from traces import make_spec, make_trace

from adapmoe_lab.policies.gating.keep import (
    fixed_k,
    gated_weights,
    keep_by_cuts,
    kept_experts,
    score_ratio,
    top_p,
)
from adapmoe_lab.records import OFF, GatingTable, RecordError

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


every_policy = pytest.mark.parametrize(
    "policy",
    [
        lambda top_k, strength: top_p(1, top_k, max(0.01, 1 - strength)),
        lambda top_k, strength: score_ratio(1, top_k, strength),
        lambda top_k, strength: fixed_k(top_k, [max(1, round(top_k * (1 - strength)))]),
        lambda top_k, strength: GatingTable(
            np.linspace(strength, 1 - strength, max(0, top_k - 1), dtype=np.float32)[None]
        ),
    ],
    ids=["top-p", "score-ratio", "fixed-k", "cut-per-number"],
)


@every_policy
@given(weights_arrays, st.floats(0, 1))
def test_numpy_and_torch_agree_to_the_last_bit(policy, weights, strength):
    table = policy(weights.shape[1], strength)
    from_torch = keep_by_cuts(torch.from_numpy(weights.copy()), table.cuts[0], table.quantity)
    from_numpy = keep_by_cuts(weights, table.cuts[0], table.quantity)
    np.testing.assert_array_equal(from_numpy, from_torch.numpy())


@every_policy
@given(weights_arrays, st.floats(0, 1))
def test_at_least_one_is_kept_and_never_a_smaller_share_over_a_larger(policy, weights, strength):
    table = policy(weights.shape[1], strength)
    keep = keep_by_cuts(weights, table.cuts[0], table.quantity)
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


def test_fixed_k_keeps_the_k_best_of_each_layer():
    trace = make_trace(make_spec(top_k=4), n_tokens=50)
    keep = kept_experts(trace, fixed_k(4, [1, 4, 2]))
    assert keep.sum(axis=2).tolist() == [[1, 4, 2]] * 50
    for layer, n in enumerate([1, 4, 2]):
        ranks = np.argsort(np.argsort(-trace.weights[:, layer], axis=1), axis=1)
        np.testing.assert_array_equal(keep[:, layer], ranks < n)


def test_score_ratio_compares_with_the_best_alone():
    weights = np.array([[0.4, 0.1, 0.21, 0.19]], dtype=np.float32)
    table = score_ratio(1, 4, 0.5)
    assert keep_by_cuts(weights, table.cuts[0], table.quantity).tolist() == [
        [True, False, True, False]
    ]
    assert keep_by_cuts(weights, score_ratio(1, 4, 0.0).cuts[0], table.quantity).all()


def test_top_p_keeps_the_fewest_that_hold_p():
    weights = np.array([[0.1, 0.5, 0.25, 0.15]], dtype=np.float32)
    for p, kept in ((0.4, 1), (0.7, 2), (0.8, 3), (1.0, 4)):
        assert keep_by_cuts(weights, top_p(1, 4, p).cuts[0]).sum() == kept


def test_impossible_policies_are_refused():
    with pytest.raises(ValueError, match=r"n_kept must lie in 1\.\.4, .*got \[2, 0\]"):
        fixed_k(4, [2, 0])
    with pytest.raises(ValueError, match=r"p must lie in 0\.\.1, .*got 1\.5"):
        top_p(2, 4, 1.5)
    with pytest.raises(ValueError, match=r"ratio must lie in 0\.\.1, .*got -1"):
        score_ratio(2, 4, -1)
    with pytest.raises(RecordError, match="Gating on 'entropy' is unknown; expected one of cumul"):
        GatingTable(np.ones((2, 1)), quantity="entropy")
