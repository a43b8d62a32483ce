import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import make_spec

from adapmoe_lab.assets import data_folder
from adapmoe_lab.policies.allocation.slots import (
    adapmoe_loads,
    budget_bytes,
    cheapest_slots,
    plan_slots,
    shared,
    slots_plan,
    uniform_plan,
    with_pins,
)
from adapmoe_lab.records import CachePlan


def test_budget_text_is_read():
    spec = make_spec()  # 24 experts of 1000 bytes
    assert budget_bytes("50%", spec) == 12_000
    assert budget_bytes("2KiB", spec) == 2048
    assert budget_bytes(5000, spec) == 5000
    assert budget_bytes(None, spec) == 24_000
    for plain in (5000.0, np.int64(5000), np.float32(5000), "5000", " 5000 B ", Fraction(5000)):
        assert budget_bytes(plain, spec) == 5000
    assert budget_bytes(0, spec) == budget_bytes("0%", spec) == 0


@pytest.mark.parametrize(
    "size",
    ["lots", "", "8 gib", "-1GiB", "nan", -1, -0.5, float("inf"), float("nan"), True, b"5000", [5]],
)
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="is not a size: give bytes, or text such as '8GiB'"):
        budget_bytes(size, make_spec())


@pytest.mark.parametrize("share", [0.5, "0.5", np.float32(0.5)])
def test_a_share_is_not_taken_for_bytes(share):
    with pytest.raises(ValueError, match=r"0\.5.* is less than a byte; .* such as '50%'"):
        budget_bytes(share, make_spec(), "host_memory")


def test_uniform_plan_counts_staging():
    plan = uniform_plan(make_spec(), 12_000)
    assert plan.slots.tolist() == [4, 3, 3]  # 12 slots less 2 for staging
    assert uniform_plan(make_spec(), 24_000).slots.tolist() == [8, 8, 8]


def test_a_budget_too_small_says_what_is_missing():
    expected = (
        r"2 slots cannot give 3 layers 1 each; raise the budget by 1 experts .* included\)\.$"
    )
    with pytest.raises(ValueError, match=expected):
        uniform_plan(make_spec(), 4000)
    assert uniform_plan(make_spec(), 4000, min_slots=0).n_slots == 2


def test_slots_plan_range():
    with pytest.raises(ValueError, match=r"must lie in 0\.\.8"):
        slots_plan(make_spec(), 9)


def published():
    return json.loads((data_folder() / "adapmoe_published.json").read_text(encoding="utf-8"))


def expected_loads(t, n, a, b):
    """AdapMoE's formula for one layer, with binomials counted out."""
    pairs = [(i < t, j < t) for i in range(n) for j in range(n) if i != j]
    p2 = sum(not x and not y for x, y in pairs) / len(pairs)
    p1 = sum(x != y for x, y in pairs) / len(pairs)
    return a * (1 - t / n) * (1 - b) + (1 - a) * (2 * p2 * (1 - b) + p2 * b + p1 * (1 - b))


def cheapest_by_trying_all(costs, total):
    choices = itertools.product(range(costs.shape[1]), repeat=len(costs))
    return min(
        sum(layer[t] for layer, t in zip(costs, chosen, strict=True))
        for chosen in choices
        if sum(chosen) == total
    )


def authors_program(costs, total):
    """Return slots by a table over layers and budgets in which every layer keeps one slot."""
    table = {0: (0.0, ())}
    for layer in costs:
        reached = {}
        for budget, (cost, slots) in table.items():
            for t in range(1, len(layer)):
                candidate = cost + layer[t], (*slots, t)
                if budget + t <= total and candidate < reached.get(budget + t, (np.inf, ())):
                    reached[budget + t] = candidate
        table = reached
    return np.array(table[total][1])


def step_by_step(costs, total):
    """Return slots, each given to the layer that gains most by it."""
    slots = np.zeros(len(costs), dtype=int)
    for _ in range(total):
        gains = [
            layer[t] - layer[t + 1] if t + 1 < len(layer) else -np.inf
            for layer, t in zip(costs, slots, strict=True)
        ]
        slots[int(np.argmax(gains))] += 1
    return slots


def total_cost(costs, slots):
    return costs[np.arange(len(slots)), slots].sum()


shares = st.lists(st.floats(0, 1), min_size=3, max_size=3)


@given(shares, shares, st.integers(2, 5), st.data())
def test_adapmoe_plan_equals_brute_force(a, b, n_experts, data):
    total = data.draw(st.integers(0, 3 * n_experts))
    plan = plan_slots(
        total, n_experts=n_experts, single_expert_ratio=a, prefetch_accuracy=b, method="adapmoe"
    )
    costs = np.array(
        [
            [expected_loads(t, n_experts, *layer) for t in range(n_experts + 1)]
            for layer in zip(a, b, strict=True)
        ]
    )
    assert plan.n_slots == total
    np.testing.assert_allclose(plan.expected_loads, costs[np.arange(3), plan.slots], atol=1e-12)
    assert plan.expected_loads.sum() == pytest.approx(cheapest_by_trying_all(costs, total))
    greedy = step_by_step(costs, total)
    assert plan.expected_loads.sum() == pytest.approx(total_cost(costs, greedy))


@given(
    st.lists(
        st.lists(st.floats(0, 9), min_size=4, max_size=4).map(lambda c: sorted(c, reverse=True)),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_measured_plan_equals_brute_force_on_any_curves(curves, data):
    curves = np.array(curves)
    total = data.draw(st.integers(0, 3 * len(curves)))
    recall = data.draw(st.lists(st.floats(0, 1), min_size=len(curves), max_size=len(curves)))
    cost = data.draw(st.lists(st.floats(0, 5), min_size=len(curves), max_size=len(curves)))
    plan = plan_slots(
        total, miss_curves=curves, prefetch_accuracy=recall, miss_cost=cost, method="measured"
    )
    uncovered = curves * (1 - np.array(recall))[:, None]
    weighted = uncovered * np.array(cost)[:, None]
    assert plan.n_slots == total
    np.testing.assert_allclose(plan.expected_loads, uncovered[np.arange(len(curves)), plan.slots])
    spent = total_cost(weighted, plan.slots)
    assert spent == pytest.approx(cheapest_by_trying_all(weighted, total), abs=1e-9)


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("total", [32, 64, 128])
def test_published_allocations_and_their_cost(total, is_gated):
    numbers = published()
    row = numbers["allocations"][f"slots={total},adaptive_gating={str(is_gated).lower()}"]
    ratio = numbers["single_expert_ratio_8x7b"] if is_gated else None
    costs = adapmoe_loads(8, ratio, numbers["prefetch_accuracy_8x7b"])
    theirs = np.array(row["published_slots"])
    assert total_cost(costs, theirs) == pytest.approx(row["published_cost"], abs=1e-6)
    floored = authors_program(costs, total)
    assert total_cost(costs, floored) == pytest.approx(row["published_cost"], abs=1e-6)
    ours = plan_slots(
        total,
        single_expert_ratio=ratio,
        prefetch_accuracy=numbers["prefetch_accuracy_8x7b"],
        method="adapmoe",
    )
    assert ours.expected_loads.sum() == pytest.approx(row["optimal_cost"], abs=1e-6)


@pytest.mark.parametrize("is_gated", [False, True])
def test_never_costs_more_than_the_floored_program_and_less_where_the_floor_binds(is_gated):
    numbers = published()
    ratio = numbers["single_expert_ratio_8x7b"] if is_gated else None
    costs = adapmoe_loads(8, ratio, numbers["prefetch_accuracy_8x7b"])
    n_binding = 0
    gains = np.column_stack([costs[:, :-1] - costs[:, 1:], np.full(len(costs), -np.inf)])
    for total in range(32, 257):
        theirs = authors_program(costs, total)
        ours = cheapest_slots(costs, total)
        saved = total_cost(costs, theirs) - total_cost(costs, ours)
        floored, next_gain = theirs == 1, gains[np.arange(len(costs)), theirs].max()
        floor_binds = floored.any() and gains[floored, 0].min() < next_gain - 1e-9
        assert saved > 1e-10 if floor_binds else saved == pytest.approx(0, abs=1e-10)
        n_binding += floor_binds
    assert (n_binding > 50) == is_gated


def test_fewer_slots_than_layers_equals_trying_all():
    numbers = published()
    costs = adapmoe_loads(8, numbers["single_expert_ratio_8x7b"], numbers["prefetch_accuracy_8x7b"])
    some = costs[[0, 1, 20, 28, 31]]
    for total in range(5):
        slots = cheapest_slots(some, total)
        assert total_cost(some, slots) == pytest.approx(cheapest_by_trying_all(some, total))


def test_what_costs_the_same_everywhere_is_divided_evenly():
    """Without gating and prefetch AdapMoE's model is a straight line: every division is as good."""
    assert plan_slots(10, single_expert_ratio=[0.0] * 4).slots.tolist() == [3, 3, 2, 2]


def test_a_call_leaves_nothing_behind_for_the_next():
    arguments = {"single_expert_ratio": [0.1, 0.9], "prefetch_accuracy": [0.0, 0.9]}
    first = plan_slots(8, **arguments)
    plan_slots(3, **arguments)
    assert plan_slots(8, **arguments).slots.tolist() == first.slots.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic"}, "method='magic' is unknown; expected 'adapmoe' or 'measured'"),
        ({}, "needs single_expert_ratio or prefetch_accuracy, one per layer"),
        ({"method": "measured"}, r"needs miss_curves; lab.miss_curves\(trace\) measures them"),
        ({"single_expert_ratio": [0.1], "n_experts": 1}, "takes two experts or more per layer"),
        (
            {"single_expert_ratio": [0.1, 0.2], "prefetch_accuracy": [0.1]},
            r"prefetch_accuracy must hold 2 numbers, one per layer, got \(1,\)",
        ),
        (
            {"single_expert_ratio": [0.1], "total_slots": 9},
            r"total_slots must lie in 0\.\.8 \(1 layers of 8 experts\), got 9",
        ),
    ],
)
def test_what_is_wrong_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_slots(**{"total_slots": 4, **arguments})


def test_shared_slots_are_as_wide_as_the_widest():
    plan = uniform_plan(make_spec(), 12_000)
    pool = shared(plan)
    assert (pool.is_global, pool.n_slots, pool.pool_slots(0)) == (True, 10, 10)
    narrow = shared(CachePlan([4, 4, 4], [10, 10, 20], 160, "given"))
    assert (narrow.n_slots, narrow.slot_bytes.tolist()) == (8, [20, 20, 20])


def test_pins_are_the_most_used_of_each_layer_or_of_all():
    plan = CachePlan([1, 1], None, None, "given")
    uses = [[1, 5, 5], [9, 8, 0]]
    assert with_pins(plan, uses).pinned == ((1,), (0,))
    assert with_pins(shared(plan), uses).pinned == ((), (0, 1))
