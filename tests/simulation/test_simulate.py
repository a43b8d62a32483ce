from dataclasses import replace

import numpy as np
import pytest
from traces import make_spec, make_trace

from adapmoe_lab.policies.allocation import slots_plan
from adapmoe_lab.policies.gating import kept_experts
from adapmoe_lab.policies.thresholds import UniformCut
from adapmoe_lab.records import HardwareProfile, TunedConfig
from adapmoe_lab.simulation.cost import layer_step_s
from adapmoe_lab.simulation.replay import replay
from adapmoe_lab.simulation.simulate import simulate


def event_by_event(hits, loads, streamed, load_s, expert_s):
    """Walk through one layer's step: a link in order, two staging rows, one compute unit."""
    now, link_free, stream_done = hits * expert_s, 0.0, []
    for miss in range(loads + streamed):
        position = miss - loads  # within the streamed experts
        row_free = stream_done[position - 2] if position >= 2 else 0.0
        link_free = max(link_free, row_free) + load_s
        now = max(now, link_free) + expert_s
        if position >= 0:
            stream_done.append(now)
    return now


@pytest.mark.parametrize("load_s", [0.1, 1.0, 3.0])
def test_cost_equals_an_event_simulation(load_s):
    counts = np.stack(np.meshgrid(*[np.arange(6)] * 3, indexing="ij")).reshape(3, -1, 1)
    costs = layer_step_s(*counts, np.array([load_s]), 1.0)
    for (hits, loads, streamed), cost in zip(counts[:, :, 0].T, costs[:, 0], strict=True):
        assert cost == pytest.approx(event_by_event(hits, loads, streamed, load_s, 1.0))


def test_tokens_of_one_step_share_their_experts():
    trace = make_trace(tokens_per_step=10)
    keep = kept_experts(trace, None)
    result = replay(trace, keep, slots_plan(trace.spec, 8))
    for step in range(len(result.hits)):
        tokens = slice(step * 10, step * 10 + 10)
        for layer in range(3):
            distinct = len(np.unique(trace.expert_indices[tokens, layer]))
            assert result.hits[step, layer] + result.misses[step, layer] == distinct
    assert result.misses.sum() == sum(
        len(np.unique(trace.expert_indices[:, layer])) for layer in range(3)
    )


def test_zero_slots_stream_everything():
    trace = make_trace()
    result = replay(trace, kept_experts(trace, None), slots_plan(trace.spec, 0))
    assert result.hits.sum() == 0
    assert result.misses.sum() == trace.n_tokens * 3 * 2


def test_gating_lowers_experts_loads_and_time():
    trace = make_trace(n_tokens=600)
    hardware = HardwareProfile("cpu", "emulated:x", [1000], [0.01], 0.001, 0.0005)
    plain = replace(TunedConfig.untuned(trace.spec), plan=slots_plan(trace.spec, 4))
    gated = replace(plain, gating=UniformCut(trace).table(0.25))
    full, fewer = simulate(trace, plain, hardware), simulate(trace, gated, hardware)
    assert full.mean_experts_per_token == 2
    assert fewer.skipped_fraction == pytest.approx(0.25, abs=0.002)
    assert fewer.bytes_per_token < full.bytes_per_token
    assert fewer.ms_per_token < full.ms_per_token
    assert fewer.loss_increase_nats is None


def test_all_resident_costs_only_computing():
    trace = make_trace(make_spec(n_experts=4), n_tokens=300)
    hardware = HardwareProfile("cpu", "emulated:x", [1000], [9.0], 0.001, 0.0005)
    result = simulate(trace, TunedConfig.untuned(trace.spec), hardware, warmup_tokens=150)
    assert result.mean_hit_rate == 1.0
    assert result.ms_per_token == pytest.approx(1 + 3 * 2 * 0.5)
