"""Figures of what slots are worth, where they go, and who leaves them."""

from dataclasses import replace

import numpy as np
import pytest
from traces import make_spec, make_trace

import adapmoe_lab as lab
from adapmoe_lab.policies.allocation.slots import adapmoe_loads, shared, slots_plan
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.records import CachePlan, GatingTable
from adapmoe_lab.simulation.replay.replay import replay
from adapmoe_lab.simulation.statistics.chance import choose_uniformly
from adapmoe_lab.views import figures


def loads_of(trace, plan, eviction="lru", gating=None):
    misses = replay(trace, kept_experts(trace, gating), plan, eviction).misses
    return misses.sum() / trace.n_tokens


def test_a_slot_is_worth_what_a_replay_saves_by_it():
    trace = make_trace(n_tokens=300)
    info = figures.marginal_benefit_info(trace)
    for slots in (0, 1, 4, 8):
        loads = loads_of(trace, slots_plan(trace.spec, slots))
        assert info.loads[:, slots].sum() == pytest.approx(loads)
    assert info.saved.sum(axis=1) == pytest.approx(info.loads[:, 0] - info.loads[:, -1])
    assert info.by_chance[[0, 4, 8]].tolist() == [2, 1, 0]


def test_a_uniform_router_follows_the_line_of_chance():
    trace = make_trace(make_spec(n_layers=2), n_tokens=4000)
    rng = np.random.default_rng(0)
    experts = np.stack([choose_uniformly(rng, 4000, 8, 2) for _ in range(2)], axis=1)
    gating = GatingTable.per_layer([0.7, 0.7], 2)
    uniform = replace(trace, expert_indices=experts)
    info = figures.marginal_benefit_info(uniform)
    assert info.loads.mean(axis=0) == pytest.approx(info.by_chance, abs=0.03)
    gated = figures.marginal_benefit_info(uniform, gating)
    assert gated.by_chance[0] == pytest.approx(kept_experts(uniform, gating).sum() / 8000)


def test_every_layer_has_its_line_and_one_stands_for_all_in_the_key():
    figure = figures.plot_marginal_benefit(figures.marginal_benefit_info(make_trace()))
    shown = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert shown[:3] == ["uniform router", "each layer, first light, last dark", "mean"]
    assert len(figure.data) == 1 + 3 + 1 + 1
    assert figure.data[-1].x.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_plans_are_judged_by_the_curves():
    trace = make_trace(n_tokens=300)
    curves = lab.miss_curves(trace)
    plans = {
        "even": slots_plan(trace.spec, 4),
        "mine": replace(slots_plan(trace.spec, 4), slots=[2, 2, 8]),
    }
    info = figures.slot_plans_info(plans, curves, "a model")
    assert info.loads.sum(axis=1) == pytest.approx([loads_of(trace, p) for p in plans.values()])
    figure = figures.plot_slot_plans(info)
    ratio = info.loads[1].sum() / info.loads[0].sum() - 1
    assert f"{ratio:+.1%}" in figure.data[-1].text[0]
    assert "12 slots for 24 experts (50%), divided in 2 ways" in figure.layout.title.text


def test_the_published_allocation_is_shown_from_published_numbers_alone():
    published = lab.published_adapmoe()
    known = {
        "single_expert_ratio": published.single_expert_ratio,
        "prefetch_accuracy": published.prefetch_accuracy,
    }
    plans = {
        "even": CachePlan(np.full(32, 4), None, None, "uniform"),
        "published": CachePlan(published.slots[128], None, None, "adapmoe"),
        "no floor": lab.plan_slots(128, **known),
    }
    info = figures.slot_plans_info(plans, adapmoe_loads(8, **known), "Mixtral")
    assert info.loads.sum(axis=1) == pytest.approx([8.958725, 6.90899, 6.662436], abs=1e-5)


def test_plans_that_cannot_be_compared_are_refused():
    spec = make_spec()
    curves = np.zeros((3, 9))
    even = slots_plan(spec, 4)
    with pytest.raises(ValueError, match=r"with as many slots, .* got even: 12, fewer: 9"):
        figures.slot_plans_info({"even": even, "fewer": slots_plan(spec, 3)}, curves, "a model")
    with pytest.raises(ValueError, match="got none"):
        figures.slot_plans_info({}, curves, "a model")
    with pytest.raises(ValueError, match="slots of 'pool' are shared; they belong to no layer"):
        figures.slot_plans_info({"even": even, "pool": shared(even)}, curves, "a model")


def test_evictions_load_what_a_replay_loads_and_none_less_than_belady():
    trace = make_trace(n_tokens=300)
    info = figures.eviction_loads_info(trace, [2, 4])
    assert info.policies == ("lfu", "lfu_aged", "least_stale", "router_average", "hobbit")
    for size, slots in enumerate([2, 4]):
        plan = slots_plan(trace.spec, slots)
        for pool, given in enumerate([plan, shared(plan)]):
            assert info.lru[pool, size] == pytest.approx(loads_of(trace, given))
            for row, name in enumerate(info.policies):
                assert info.loads[pool, row, size] == pytest.approx(loads_of(trace, given, name))
    assert (info.loads >= info.belady[:, None]).all()
    assert (info.belady[1] <= info.belady[0]).all()


def test_the_gap_closed_is_between_lru_per_layer_and_belady():
    info = figures.eviction_loads_info(make_trace(n_tokens=300), [2, 4], ["lfu_aged"])
    gaps = info.gap_closed(4)
    base, bound = info.lru[0, 1], info.belady[:, 1]
    assert gaps["lru"][0] == 0
    assert gaps["lfu_aged"] == pytest.approx(tuple((base - info.loads[:, 0, 1]) / (base - bound)))
    with pytest.raises(ValueError, match="3 slots per layer were not replayed; there are 2, 4"):
        info.gap_closed(3)
    bars = figures.plot_gap_closed(info, 4).data
    assert bars[1].x[1] == gaps["lfu_aged"][1]
    assert list(bars[0].y) == ["LRU", "LFU, aged"]


def test_lines_are_relative_to_lru_and_tell_the_loads():
    info = figures.eviction_loads_info(make_trace(n_tokens=300), policies=["lfu_aged"])
    assert info.sizes.tolist() == [1, 2, 3, 4, 5, 6, 7]
    figure = figures.plot_eviction_loads(info)
    own, pool = figure.data[:3], figure.data[3:]
    assert [line.name for line in own] == ["Belady, knows the future", "LRU", "LFU, aged"]
    assert own[1].y.tolist() == [1.0] * 7
    assert pool[2].y == pytest.approx(info.loads[1, 0] / info.lru[0])
    assert pool[2].customdata == pytest.approx(info.loads[1, 0])
    assert {line.showlegend for line in pool} == {False}
    assert figure.layout.yaxis.range[1] <= 1.53
