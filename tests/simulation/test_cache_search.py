"""Plans and evictions are chosen by what they load, on tokens that the plan was not made from."""

from dataclasses import replace

import numpy as np
import pytest
from traces import make_spec, make_trace

from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.records import GatingTable
from adapmoe_lab.simulation.replay.replay import replay
from adapmoe_lab.simulation.search.cache_search import (
    best_cache,
    cache_choices,
    gap_closed,
    slot_divisions,
)


def uneven_trace(n_tokens=400):
    """Layer 0 uses two experts only, layer 1 all eight by turns, layer 2 as `make_trace` has it."""
    trace = make_trace(n_tokens=n_tokens)
    experts = trace.expert_indices.copy()
    experts[:, 0] = [0, 1]
    turns = np.arange(n_tokens)
    experts[:, 1] = np.stack([2 * turns % 8, (2 * turns + 1) % 8], axis=1)
    return replace(trace, expert_indices=experts, predictions={})


def test_every_division_has_as_many_slots():
    trace = uneven_trace()
    plans = slot_divisions(trace, slots_plan(trace.spec, 4))
    assert set(plans) == {"uniform", "measured", "adapmoe", "shared"}
    assert [plan.n_slots for plan in plans.values()] == [12] * 4
    assert plans["measured"].slots[:2].tolist() == [2, 8]  # all that these layers can use
    assert plans["measured"].method == "measured"
    assert plans["measured"].slot_bytes.tolist() == [1000] * 3
    assert plans["shared"].is_global
    assert plans["adapmoe"].slots.tolist() == [4, 4, 4]  # it sees neither skipping nor prediction


def test_the_papers_division_is_for_top_2_only():
    trace = make_trace(make_spec(top_k=3))
    assert "adapmoe" not in slot_divisions(trace, slots_plan(trace.spec, 4))


def test_loads_are_those_of_a_replay_after_the_first_tokens():
    trace = make_trace(n_tokens=300)
    gating = GatingTable.per_layer([0.7, 0.8, 0.9], 2)
    plan = slots_plan(trace.spec, 3)
    found = cache_choices(trace, {"mine": plan}, ["lfu", "belady"], gating, first_counted=100)
    assert [(r.division, r.eviction) for r in found] == [("mine", "lfu"), ("mine", "belady")]
    for residency in found:
        keep = kept_experts(trace, gating)
        misses = replay(trace, keep, plan, residency.eviction).misses
        assert residency.loads_per_token == pytest.approx(misses[100:].sum() / 200)


def test_the_best_loads_least_of_all_that_was_tried():
    trace = uneven_trace()
    best, tried = best_cache(trace, slots_plan(trace.spec, 4))
    assert len(tried) == 6
    assert best.loads_per_token == min(r.loads_per_token for r in tried)
    assert best.division == "measured"
    assert best.loads_per_token < tried[0].loads_per_token / 2
    assert (tried[0].division, tried[0].eviction) == ("uniform", "lru")


def test_what_reads_scores_is_not_tried_of_a_trace_without_them():
    trace = uneven_trace().chosen_only()
    _, tried = best_cache(trace, slots_plan(trace.spec, 4))
    assert {choice.eviction for choice in tried} == {"lru", "lfu_aged"}
    with pytest.raises(ValueError, match="without router_probs"):
        best_cache(trace, slots_plan(trace.spec, 4), evictions=["router_average"])


def test_what_changes_half_way_is_not_praised_for_its_first_half():
    trace = uneven_trace()
    experts = trace.expert_indices.copy()
    experts[200:, :2] = experts[200:, 1::-1]  # the layers change places
    best, _ = best_cache(replace(trace, expert_indices=experts), slots_plan(trace.spec, 4))
    assert best.division == "uniform"


def test_where_everything_fits_the_plainest_is_kept():
    trace = make_trace()
    best, _ = best_cache(trace, slots_plan(trace.spec, 8))
    assert (best.division, best.eviction) == ("uniform", "lru")


def test_the_gap_is_between_the_baseline_and_belady():
    assert gap_closed(8.0, 10.0, 6.0) == 0.5
    assert gap_closed(11.0, 10.0, 6.0) == -0.25
    assert np.isnan(gap_closed(3.0, 3.0, 3.0))
