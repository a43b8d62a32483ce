"""The arithmetic of evictions: exact however long it runs, and the same wherever it is computed."""

from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction

import numba
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toy_policies import TOY

from adapmoe_lab.policies.eviction.fixed_point import (
    FIXED_SCORES,
    mean_score,
    score_sums,
    token_weight,
)
from adapmoe_lab.policies.eviction.hobbit import is_high_precision
from adapmoe_lab.policies.eviction.lfu import LFU
from adapmoe_lab.policies.eviction.lfu_aged import LFU_AGED
from adapmoe_lab.policies.eviction.lru import LRU
from adapmoe_lab.policies.eviction.policy import PROTECTED, Use
from adapmoe_lab.policies.eviction.registry import POLICIES, policy_named, register, unregister
from adapmoe_lab.policies.eviction.router_average import ROUTER_AVERAGE
from adapmoe_lab.records import CachePlan
from adapmoe_lab.simulation.compiled import inlined

LONG = [0, 2**24, 2**31, 2**40, 2**57]


def unchanged(priority, score=0):
    return priority


def step_of(policy, made=lambda function: function):
    """Return what a policy does to an expert in a step, of functions made into something else."""
    on_new_pass, on_new_step, on_scores = (
        made(trait or unchanged)
        for trait in (policy.on_new_pass, policy.on_new_step, policy.on_scores)
    )
    weight, mean, after_use = made(token_weight), made(mean_score), made(policy.after_use)

    def step(priority, state, total, n_tokens, was_resident, oracle_input, clock, n_layers):
        priority = on_new_step(on_new_pass(priority))
        priority = on_scores(priority, mean(total, weight(n_tokens)))
        use = Use(was_resident, oracle_input, clock, n_layers, clock // n_layers)
        return after_use(priority, state, use)

    return step


@pytest.mark.parametrize("before", LONG)
@pytest.mark.parametrize("policy", [*POLICIES.values(), TOY], ids=lambda policy: policy.name)
@settings(max_examples=25, deadline=None)  # the first one compiles
@given(
    uses=st.lists(
        st.tuples(st.integers(0, 2**24), st.booleans(), st.booleans(), st.integers(1, 5)),
        min_size=1,
        max_size=30,
    ),
    n_tokens=st.integers(1, 10_000),
)
def test_integers_of_any_size_arrays_and_compiled_code_agree(policy, before, uses, n_tokens):
    n_layers, clock = 3, before - before % 3
    step, compiled_step = step_of(policy), compiled_steps(policy)
    exact, compiled, array = (0, 0), (0, 0), (np.zeros(2, np.int64), np.zeros(2, np.int64))
    for score, was_resident, oracle_input, passes in uses:
        scores, use = (score * n_tokens, n_tokens), np.array([was_resident, oracle_input], int)
        exact = step(*exact, *scores, *use.tolist(), clock, n_layers)
        compiled = compiled_step(*compiled, *scores, *use.tolist(), clock, n_layers)
        array = step(*array, *scores, *use[:, None].repeat(2, axis=1), clock, n_layers)
        array = [np.broadcast_to(kept, 2) for kept in array]
        assert compiled == exact
        assert [kept.dtype for kept in array] == [np.int64, np.int64]
        assert [kept.tolist() for kept in array] == [[kept] * 2 for kept in exact]
        assert 0 <= exact[0] < PROTECTED
        clock += passes * n_layers


_COMPILED = {}


def compiled_steps(policy):
    if policy not in _COMPILED:
        _COMPILED[policy] = numba.njit(step_of(policy, inlined))
    return _COMPILED[policy]


def after(policy, priority=0, state=0, was_resident=1, clock=0):
    return policy.after_use(priority, state, Use(was_resident, 0, clock, 1, clock))


@pytest.mark.parametrize("before", LONG)
def test_stamps_tell_every_step_from_the_next(before):
    clocks = range(before, before + 5)
    stamps = [after(LRU, was_resident=hit, clock=c)[0] for c in clocks for hit in (1, 0)]
    assert stamps == sorted(set(stamps))


@pytest.mark.parametrize("before", LONG)
@pytest.mark.parametrize("n_uses", [1, 2**21, 2**22, 2**28])
def test_of_those_used_as_often_the_least_recent_leaves_first(n_uses, before):
    counts = np.full(4, n_uses)
    clocks = np.array([0, 1, 2, 2**31 - 1]) + before
    priorities, counts = after(LFU, counts, counts, clock=clocks)
    assert (np.diff(priorities) > 0).all()
    oftener, _ = after(LFU, priorities[0], counts[0], clock=before + 1)
    assert oftener > priorities[3]


def test_beyond_half_a_billion_uses_the_least_recent_leaves_first():
    priorities, counts = after(LFU, 0, np.array([2**29 - 1, 2**29, 2**29]), clock=2**57)
    assert (counts == 2**29).all()
    assert len(set(priorities.tolist())) == 1
    assert after(LFU, 0, 2**29, clock=2**57 + 1)[0] > priorities[0]


def test_averages_of_the_largest_numbers_stay_in_range():
    largest = mean_score(2**24 * 7, token_weight(7))
    uses = scores = 0
    for _ in range(3000):
        uses, _ = after(LFU_AGED, LFU_AGED.on_new_step(uses))
        scores = ROUTER_AVERAGE.on_scores(scores, largest)
    for value, most in ((uses, 20 * 2**46), (scores, 50 * 2**42)):
        assert value == pytest.approx(most, rel=1e-3)
        assert value < PROTECTED


def test_what_was_not_used_for_long_is_all_alike():
    few, many = 2**46, 20 * 2**46
    for _ in range(800):
        few, many = (LFU_AGED.on_new_step(value) for value in (few, many))
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
    assert [is_high_precision(scores, own) for own in range(len(scores))] == expected


def test_which_policies_can_run_where():
    can_run = {"lru", "lfu", "lfu_aged", "router_average", "least_stale", "hobbit", "static"}
    assert {name for name, policy in POLICIES.items() if not policy.needs_future} == can_run
    on_device = {"lru", "lfu_aged", "router_average", "static"}
    assert {name for name, policy in POLICIES.items() if not policy.host_only} == on_device
    reading = {"router_average", "hobbit"}
    assert {name for name, policy in POLICIES.items() if policy.needs_scores} == reading


def test_a_policy_that_needs_the_host_or_the_future_is_refused_by_name():
    for policy in POLICIES.values():
        if policy.host_only:
            with pytest.raises(ValueError, match=f"'{policy.name}' (needs the host|reads what)"):
                policy.check_on_device()
        else:
            policy.check_on_device()


@pytest.mark.parametrize("policy", [*POLICIES.values(), TOY], ids=lambda policy: policy.name)
def test_a_plan_pins_exactly_for_policies_that_keep_pins(policy):
    slots = np.array([2, 2])
    plain = CachePlan(slots, None, None, "given")
    pinning = replace(plain, pinned=((0,), (1,)))
    good, wrong = (pinning, plain) if policy.pins else (plain, pinning)
    policy.check_plan(good)
    message = f"'{policy.name}' keeps (the|no) pinned experts.* and this plan pins (some|none)"
    with pytest.raises(ValueError, match=message):
        policy.check_plan(wrong)
    with pytest.raises(ValueError, match=message) if policy.pins else nullcontext():
        policy.check_plan(None)


def test_a_name_stands_for_one_policy():
    register(TOY)
    try:
        register(replace(TOY))  # the same
        with pytest.raises(ValueError, match=r"Another eviction policy is called 'toy'.*a name of"):
            register(replace(TOY, after_use=LRU.after_use))
        assert policy_named("toy") is TOY
    finally:
        unregister("toy")
    with pytest.raises(ValueError, match="eviction='toy' is unknown; expected one of lru, lfu"):
        policy_named("toy")
    with pytest.raises(ValueError, match="eviction='toy' is unknown"):
        unregister("toy")


def test_what_is_registered_can_only_be_read():
    with pytest.raises(TypeError, match="does not support item assignment"):
        POLICIES["lru"] = TOY
