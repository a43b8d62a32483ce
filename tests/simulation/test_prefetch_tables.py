"""Prefetch sources: probabilities counted anew, and choices judged by the clock."""

from dataclasses import replace

import numpy as np
import pytest
from traces import make_trace, predicting

from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.policies.gating.uniform import UniformCut
from adapmoe_lab.records import HardwareProfile, RecordError, TunedConfig
from adapmoe_lab.simulation.search.prefetch_search import (
    best_prefetch,
    plan_prefetch,
    recorded_sources,
)
from adapmoe_lab.simulation.simulate import simulate


def resident_before(trace, keep, n_slots):
    """Return who is resident before every step of each layer under LRU, bool [T, L, E]."""
    held = np.zeros((trace.n_tokens, trace.spec.n_layers, trace.spec.n_experts), dtype=bool)
    for layer in range(trace.spec.n_layers):
        order = []
        for token in range(trace.n_tokens):
            held[token, layer, order] = True
            needed = sorted(trace.expert_indices[token, layer][keep[token, layer]].tolist())
            kept = [expert for expert in order if expert not in needed]
            hits = [expert for expert in needed if expert in order]
            misses = [expert for expert in needed if expert not in order]
            order = [*kept, *hits, *misses][-n_slots:]
    return held


@pytest.mark.parametrize("is_gated", [False, True])
def test_probabilities_are_those_of_guesses_of_absent_experts(is_gated):
    trace = predicting(make_trace(n_tokens=1000), 0.7)
    gating = UniformCut(trace).table(0.25) if is_gated else None
    table = plan_prefetch(trace, gating=gating, plan=slots_plan(trace.spec, 3))
    keep = kept_experts(trace, gating)
    held = resident_before(trace, keep, 3)
    predicted = trace.predictions["next_router"][1].experts
    for layer in (1, 2):
        for rank in range(2):
            if is_gated and rank == 1:  # only where the gate would keep the second
                is_kept = trace.weights[:, layer].astype(np.float16).astype(np.float32)
                share = is_kept[:, 0] / is_kept.sum(axis=1)
                is_meant = share < gating.cuts[layer, 0]
            else:
                is_meant = np.ones(trace.n_tokens, dtype=bool)
            who = predicted[:, layer, rank]
            is_absent = ~held[np.arange(trace.n_tokens), layer, who] & is_meant
            needed = ((trace.expert_indices[:, layer] == who[:, None]) & keep[:, layer]).any(axis=1)
            expected = needed[is_absent].mean()
            assert table.sources[0].probability[layer, rank] == pytest.approx(expected)
    assert not table.sources[0].probability[0].any()


def test_good_guesses_are_followed_and_bad_ones_are_not():
    hardware = HardwareProfile("cpu", "emulated:x", [250, 1000], [0.0005, 0.002], 0.006, 0.0005)
    costly = replace(hardware, predict_s=0.001)
    trace = make_trace(n_tokens=600)
    config = replace(TunedConfig.untuned(trace.spec), plan=slots_plan(trace.spec, 4))
    table, times = best_prefetch(predicting(trace, 0.9), config, hardware)
    assert table is not None
    assert times["the next layer"] < times["none"]
    simulated = simulate(predicting(trace, 0.9), replace(config, prefetch=table), hardware)
    assert simulated.ms_per_token == times["the next layer"]
    table, times = best_prefetch(predicting(trace, 0.0), config, costly)
    assert table is None
    assert min(times, key=lambda name: times[name]) == "none"


def test_sources_are_those_recorded_the_fitted_before_others():
    trace = make_trace()
    (said,) = trace.predictions["next_router"].values()
    trace = replace(trace, predictions={"ridge": {1: said}, "next_router": {1: said, 2: said}})
    assert recorded_sources(trace) == [("next_router", 1), ("next_router", 2)]
    assert recorded_sources(trace, fitted=object()) == [("ridge", 1), ("next_router", 2)]


def test_a_source_that_was_not_recorded_is_refused():
    with pytest.raises(RecordError, match=r"'own_norm' at distance 1; it holds next_router at"):
        plan_prefetch(make_trace(), sources=[("own_norm", 1)])
