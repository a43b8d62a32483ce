"""The cache that serves a model: its slots, and what a policy asks of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from step_rules import run_cache

from adapmoe_lab.policies.eviction.expert_cache import ExpertCache
from adapmoe_lab.policies.eviction.registry import POLICIES
from adapmoe_lab.records import CachePlan

N_EXPERTS = 6


@st.composite
def routed_steps(draw):
    """Return sets of experts by step and layer, slots, and scores."""
    n_layers = draw(st.integers(1, 3))
    members = st.sets(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=4)
    layers = st.lists(members, min_size=n_layers, max_size=n_layers)
    sets = draw(st.lists(layers, min_size=1, max_size=25))
    slots = draw(st.lists(st.integers(0, N_EXPERTS), min_size=n_layers, max_size=n_layers))
    seed = draw(st.integers(0, 1000))
    shape = (len(sets), n_layers, N_EXPERTS)
    scores = np.random.default_rng(seed).dirichlet(np.ones(N_EXPERTS), shape[:2])
    return sets, slots, scores.astype(np.float16)


def plan_of(slots, is_global=False, pinned=None):
    return CachePlan(np.array(slots), None, None, "given", is_global=is_global, pinned=pinned)


@pytest.mark.parametrize("is_global", [False, True])
@given(case=routed_steps(), data=st.data())
def test_no_slot_holds_two_experts_whatever_stops_a_step(is_global, case, data):
    sets, slots, scores = case
    plan = plan_of(slots, is_global)
    cache = ExpertCache(plan, N_EXPERTS, POLICIES["router_average"])
    for number, layers in enumerate(sets):
        for layer, members in enumerate(layers):
            before = cache.slot_of.copy()
            step = cache.plan_step(layer, members, scores[number][layer][None])
            assert not {load.evicted for load in step.loads} & {(layer, e) for e in members}
            cache.vacate(step)
            for load in step.loads[: data.draw(st.integers(0, len(step.loads)))]:
                cache.occupy(load)
            kept = cache.slot_of >= 0
            arrived = np.zeros_like(kept)
            arrived[layer, [load.expert for load in step.loads]] = True
            assert ((cache.slot_of == before) | arrived)[kept].all()
            for pool in range(plan.n_pools):
                rows = cache.slot_of if is_global else cache.slot_of[pool : pool + 1]
                taken = rows[rows >= 0]
                assert len(set(taken.tolist())) == len(taken)
                assert (taken < plan.pool_slots(pool)).all()


def test_a_full_cache_keeps_everything():
    cache = ExpertCache(plan_of([4]), 4, POLICIES["lru"])
    first, second = run_cache(cache, [[{0, 1, 2, 3}], [{0, 1, 2, 3}]])
    assert (first.placed, second.hits) == ([0, 1, 2, 3], [0, 1, 2, 3])


def test_the_average_is_of_every_score_not_only_of_those_used():
    scores = np.array([[0.0, 0.5, 0.1, 0.4], [0.0, 0.5, 0.4, 0.1], [0.0, 0.5, 0.4, 0.1]])
    sets = [[{1}], [{2}], [{0}]]
    cache = ExpertCache(plan_of([2]), 4, POLICIES["router_average"])
    *_, last = run_cache(cache, sets, scores[:, None])
    assert last.evicted == [(0, 2)]  # 1 is the older, and the likelier all along


def test_a_pinned_expert_waits_for_its_slot_and_then_stays():
    cache = ExpertCache(plan_of([2], pinned=((0, 1),)), 4, POLICIES["static"])
    done = run_cache(cache, [[{2}], [{0, 1}], [{2, 3}], [{0, 1}]])
    assert [step.evicted for step in done] == [[], [(0, 2)], [], []]
    assert [step.streamed for step in done] == [[], [], [2, 3], []]


def test_the_future_cannot_be_run():
    with pytest.raises(ValueError, match="'belady' reads what comes later, as only a simulation"):
        ExpertCache(plan_of([2]), 4, POLICIES["belady"])


def test_a_policy_without_the_scores_it_reads_says_so():
    cache = ExpertCache(plan_of([2]), 4, POLICIES["router_average"])
    with pytest.raises(ValueError, match="reads the router's scores; give those of the step's"):
        cache.plan_step(0, {1})
