from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import make_spec

from adapmoe_lab.policies.allocation import budget_bytes, slots_plan, uniform_plan
from adapmoe_lab.policies.residency import LayerCache

steps_of_experts = st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=5), max_size=60)


def lru_reference(steps, n_slots):
    """Return (hits, misses, streamed) per step by the step rules, written out plainly."""
    resident: OrderedDict[int, None] = OrderedDict()
    results = []
    for members in steps:
        hits = sorted(e for e in members if e in resident)
        misses = sorted(e for e in members if e not in resident)
        placed = misses[: n_slots - len(hits)]
        while len(resident) + len(placed) > n_slots:
            resident.pop(next(e for e in resident if e not in members))
        for expert in hits:
            resident.move_to_end(expert)
        for expert in placed:
            resident[expert] = None
        results.append((hits, placed, misses[len(placed) :]))
    return results


@given(steps_of_experts, st.integers(0, 8))
def test_equals_the_rules_written_out(steps, n_slots):
    cache = LayerCache(n_slots)
    plans = [cache.step(members) for members in steps]
    seen = [(list(p.hits), [load.expert for load in p.loads], list(p.streamed)) for p in plans]
    assert seen == lru_reference(steps, n_slots)


@given(steps_of_experts, st.integers(0, 8))
def test_no_slot_holds_two_experts_and_none_is_out_of_range(steps, n_slots):
    cache = LayerCache(n_slots)
    for members in steps:
        plan = cache.step(members)
        slots = list(cache.slot_of.values())
        assert len(set(slots)) == len(slots) <= n_slots
        assert all(0 <= slot < n_slots for slot in slots)
        assert not {load.evicted for load in plan.loads} & set(members)


@given(steps_of_experts, st.integers(1, 8), st.data())
def test_a_step_stopped_halfway_only_frees_slots(steps, n_slots, data):
    cache = LayerCache(n_slots)
    for members in steps:
        before = dict(cache.slot_of)
        plan = cache.plan(members)
        cache.vacate(plan)
        for load in plan.loads[: data.draw(st.integers(0, len(plan.loads)))]:
            cache.occupy(load)
        arrived = {load.expert for load in plan.loads}
        for expert, slot in cache.slot_of.items():
            assert before.get(expert) == slot or expert in arrived


def test_a_full_cache_keeps_everything():
    cache = LayerCache(4)
    assert cache.step([0, 1, 2, 3]).n_misses == 4
    assert cache.step([0, 1, 2, 3]).hits == (0, 1, 2, 3)
    cache.clear()
    assert cache.step([2]).n_misses == 1


def test_budget_text_is_read():
    spec = make_spec()  # 24 experts of 1000 bytes
    assert budget_bytes("50%", spec) == 12_000
    assert budget_bytes("2KiB", spec) == 2048
    assert budget_bytes(5000, spec) == 5000
    assert budget_bytes(None, spec) == 24_000
    with pytest.raises(ValueError, match="expert_memory='lots' is not a size: give bytes, or"):
        budget_bytes("lots", spec)


def test_uniform_plan_counts_staging():
    plan = uniform_plan(make_spec(), 12_000)
    assert plan.slots.tolist() == [4, 3, 3]  # 12 slots less 2 for staging
    assert uniform_plan(make_spec(), 24_000).slots.tolist() == [8, 8, 8]


def test_a_budget_too_small_says_what_is_missing():
    with pytest.raises(
        ValueError, match=r"2 slots cannot give 3 layers 1 each; raise the budget by 1 experts"
    ):
        uniform_plan(make_spec(), 4000)
    assert uniform_plan(make_spec(), 4000, min_slots=0).n_slots == 2


def test_slots_plan_range():
    with pytest.raises(ValueError, match=r"must lie in 0\.\.8"):
        slots_plan(make_spec(), 9)
