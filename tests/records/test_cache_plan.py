from dataclasses import replace

import pytest
from traces import make_spec

from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.records import CachePlan, RecordError, TunedConfig


@pytest.fixture
def plan():
    return CachePlan([2, 0, 3], [10, 10, 20], 100, "given", pinned=((1, 0), (), (7,)))


def test_reads_back_equal(plan):
    assert CachePlan.from_json(plan.to_json()).to_json() == plan.to_json()
    assert plan.pinned == ((0, 1), (), (7,))
    assert plan.pinned_mask(8).nonzero()[1].tolist() == [0, 1, 7]


def test_a_pool_is_all_slots_together(plan):
    shared = replace(plan, is_global=True)
    assert [plan.pool_slots(pool) for pool in range(plan.n_pools)] == [2, 0, 3]
    assert [shared.pool_slots(pool) for pool in range(shared.n_pools)] == [5]
    assert not plan.holds_all(3)
    assert not shared.holds_all(2)
    assert slots_plan(make_spec(), 8).holds_all(8)
    assert replace(slots_plan(make_spec(), 8), is_global=True).holds_all(8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": [1, -1, 2]}, "slots must not be negative"),
        ({"pinned": ((0, 1, 2), (), ())}, r"3 pinned experts do not fit .* by layer \[3, 0, 0\]"),
        ({"pinned": ((0,), (), ()), "slots": [1, 1]}, "for 2 layers, got 3"),
        (
            {"pinned": (range(6), (), ()), "is_global": True},
            "6 pinned experts do not fit the plan's 5 slots. Pin fewer, or plan more slots.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(plan, change, message):
    if len(change.get("slots", ())) == 2:
        change = {**change, "slot_bytes": [10, 10]}
    with pytest.raises(RecordError, match=message):
        replace(plan, **change)


def test_a_config_refuses_pins_of_experts_that_are_not_there(plan):
    model = TunedConfig.model_identity(make_spec())
    assert TunedConfig(model, plan=plan, eviction="static").plan is plan
    with pytest.raises(RecordError, match=r"must lie in 0\.\.7, got"):
        TunedConfig(model, plan=replace(plan, pinned=((8,), (), ())), eviction="static")
