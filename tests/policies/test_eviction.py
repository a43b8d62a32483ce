"""The arithmetic of evictions: exact however long it runs, and the same wherever it is computed."""

from fractions import Fraction

import numba
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapmoe_lab.policies.eviction.expert_cache import high_precision_uses, score_sums
from adapmoe_lab.policies.eviction.rules import (
    FIXED_SCORES,
    LFU,
    LFU_AGED,
    LRU,
    NEVER_LEAVES,
    POLICIES,
    ROUTER_AVERAGE,
    after_use,
    mean_score,
    priority_in_new_pass,
    priority_in_new_step,
    token_weight,
)
from adapmoe_lab.simulation.replay import pool_loops as loops

LONG = [0, 2**24, 2**31, 2**40, 2**57]
RULES = sorted({policy.rule for policy in POLICIES.values()})


@numba.njit
def compiled_step(rule, value, memory, total, n_tokens, was_resident, hint, clock, n_layers):
    value = loops.priority_in_new_pass(rule, value)
    score = loops.mean_score(total, loops.token_weight(n_tokens))
    value = loops.priority_in_new_step(rule, value, score)
    return loops.after_use(
        rule, value, memory, was_resident, hint, clock, n_layers, clock // n_layers
    )


def step(rule, value, memory, total, n_tokens, was_resident, hint, clock, n_layers):
    value = priority_in_new_pass(rule, value)
    value = priority_in_new_step(rule, value, mean_score(total, token_weight(n_tokens)))
    return after_use(rule, value, memory, was_resident, hint, clock, n_layers, clock // n_layers)


@pytest.mark.parametrize("before", LONG)
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=25, deadline=None)  # the first one compiles
@given(
    uses=st.lists(
        st.tuples(st.integers(0, 2**24), st.booleans(), st.booleans(), st.integers(1, 5)),
        min_size=1,
        max_size=30,
    ),
    n_tokens=st.integers(1, 10_000),
)
def test_integers_of_any_size_arrays_and_compiled_code_agree(rule, before, uses, n_tokens):
    n_layers, clock = 3, before - before % 3
    exact, compiled, array = (0, 0), (0, 0), (np.zeros(2, np.int64), np.zeros(2, np.int64))
    for score, was_resident, hint, passes in uses:
        scores, use = (score * n_tokens, n_tokens), np.array([was_resident, hint], dtype=np.int64)
        exact = step(rule, *exact, *scores, *use.tolist(), clock, n_layers)
        compiled = compiled_step(rule, *compiled, *scores, *use.tolist(), clock, n_layers)
        array = step(rule, *array, *scores, *use[:, None].repeat(2, axis=1), clock, n_layers)
        assert compiled == exact
        assert [kept.dtype for kept in array] == [np.int64, np.int64]
        assert [kept.tolist() for kept in array] == [[kept] * 2 for kept in exact]
        assert 0 <= exact[0] < NEVER_LEAVES
        clock += passes * n_layers


@pytest.mark.parametrize("before", LONG)
def test_stamps_tell_every_step_from_the_next(before):
    clocks = range(before, before + 5)
    stamps = [after_use(LRU, 0, 0, hit, 0, clock, 1, 0)[0] for clock in clocks for hit in (1, 0)]
    assert stamps == sorted(set(stamps))


@pytest.mark.parametrize("before", LONG)
@pytest.mark.parametrize("n_uses", [1, 2**21, 2**22, 2**28])
def test_of_those_used_as_often_the_least_recent_leaves_first(n_uses, before):
    counts = np.full(4, n_uses)
    clocks = np.array([0, 1, 2, 2**31 - 1]) + before
    values, counts = after_use(LFU, counts, counts, 1, 0, clocks, 1, 0)
    assert (np.diff(values) > 0).all()
    oftener, _ = after_use(LFU, values[0], counts[0], 1, 0, before + 1, 1, 0)
    assert oftener > values[3]


def test_beyond_half_a_billion_uses_the_least_recent_leaves_first():
    values, counts = after_use(LFU, 0, np.array([2**29 - 1, 2**29, 2**29]), 1, 0, 2**57, 1, 0)
    assert (counts == 2**29).all()
    assert len(set(values.tolist())) == 1
    assert after_use(LFU, 0, 2**29, 1, 0, 2**57 + 1, 1, 0)[0] > values[0]


def test_averages_of_the_largest_numbers_stay_in_range():
    largest = mean_score(2**24 * 7, token_weight(7))
    uses = scores = 0
    for _ in range(3000):
        uses = after_use(LFU_AGED, priority_in_new_step(LFU_AGED, uses, 0), 0, 1, 0, 0, 1, 0)[0]
        scores = priority_in_new_step(ROUTER_AVERAGE, scores, largest)
    for value, most in ((uses, 20 * 2**46), (scores, 50 * 2**42)):
        assert value == pytest.approx(most, rel=1e-3)
        assert value < NEVER_LEAVES


def test_what_was_not_used_for_long_is_all_alike():
    few, many = 2**46, 20 * 2**46
    for _ in range(800):
        few, many = (priority_in_new_step(LFU_AGED, value, 0) for value in (few, many))
    assert few == many < 2**46


def test_every_score_is_exact():
    scores = np.arange(2**16, dtype=np.uint16).view(np.float16)
    lies_within = (scores >= 0) & (scores <= 1)
    for score, fixed in zip(scores[lies_within].tolist(), FIXED_SCORES[lies_within], strict=True):
        assert Fraction(score) == Fraction(int(fixed), 2**24)
    assert set(FIXED_SCORES[scores > 1]) == {2**24}
    assert set(FIXED_SCORES[(scores < 0) | np.isnan(scores)]) == {0}


@given(seed=st.integers(0, 100), n_tokens=st.integers(1, 300))
@example(seed=0, n_tokens=4096)
def test_the_order_of_tokens_does_not_matter(seed, n_tokens):
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.full(8, 0.1), n_tokens)
    sums = score_sums(scores)
    np.testing.assert_array_equal(score_sums(rng.permutation(scores)), sums)
    means = mean_score(sums, token_weight(n_tokens)) / 2**42
    np.testing.assert_allclose(means, scores.astype(np.float16).mean(axis=0, dtype=float), 1e-6)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([6, 4], [True, True]), ([601, 399], [True, False]), ([3, 3, 3, 1], [True] * 3 + [False])],
)
def test_those_above_hold_at_most_three_fifths(scores, expected):
    assert high_precision_uses(np.array(scores)).tolist() == expected
