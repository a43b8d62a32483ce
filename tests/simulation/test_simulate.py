from dataclasses import replace

import numpy as np
import pytest
from traces import make_spec, make_trace

from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.policies.gating.uniform import UniformCut
from adapmoe_lab.records import (
    HardwareProfile,
    PrecisionPlan,
    PrefetchSource,
    PrefetchTable,
    RecordError,
    TunedConfig,
)
from adapmoe_lab.simulation.replay.replay import replay
from adapmoe_lab.simulation.simulate import simulate


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
    assert fewer.link_idle_share > full.link_idle_share
    assert fewer.stall_ms_per_token.sum() < full.stall_ms_per_token.sum()
    assert fewer.loss_increase_nats is None


def test_what_misses_and_waits_take_of_the_host_is_in_the_prediction():
    trace = make_trace(n_tokens=600)
    plain = HardwareProfile("cpu", "emulated:x", [1000], [0.01], 0.001, 0.0005)
    config = replace(TunedConfig.untuned(trace.spec), plan=slots_plan(trace.spec, 4))
    of_plain = simulate(trace, config, plain)
    with_miss = simulate(trace, config, replace(plain, miss_s=0.02)).ms_per_token
    n_misses = of_plain.loads_per_token.sum()
    assert with_miss > of_plain.ms_per_token + 5 * n_misses  # some of it hides behind the link
    with_wait = simulate(trace, config, replace(plain, wait_s=0.003)).ms_per_token
    waits = with_wait - of_plain.ms_per_token
    assert n_misses / 2 * 3 <= waits <= n_misses * 3  # one wait is for one or two experts


def test_right_candidates_hide_loads_and_move_the_same_bytes():
    trace = make_trace(n_tokens=600)
    hardware = HardwareProfile("cpu", "emulated:x", [250, 1000], [0.0005, 0.002], 0.006, 0.0005)
    plain = replace(TunedConfig.untuned(trace.spec), plan=slots_plan(trace.spec, 4))
    sure = PrefetchTable([PrefetchSource("next_router", 1, np.ones((3, 2)))], buffer_slots=4)
    ahead = replace(plain, prefetch=sure)
    before, after = simulate(trace, plain, hardware), simulate(trace, ahead, hardware)
    np.testing.assert_array_equal(after.hit_rate, before.hit_rate)
    assert after.prefetch_used_per_token[0] == 0  # of the first layer nothing is said
    assert (after.loads_per_token[1:] < 0.2 * before.loads_per_token[1:]).all()
    assert not after.prefetch_wasted_per_token.any()  # the trace's candidates are its routing
    assert after.bytes_per_token == pytest.approx(before.bytes_per_token)
    assert after.ms_per_token < before.ms_per_token
    assert after.mean_hit_rate == pytest.approx(before.mean_hit_rate)


def test_gating_takes_time_in_every_layer_and_for_every_prediction():
    trace = make_trace(n_tokens=300)
    hardware = HardwareProfile(
        "cpu", "emulated:x", [1000], [0.0], 0.006, 0.0005,
        gate_s=0.001, predict_s=0.0005, gated_predict_s=0.001,
    )  # fmt: skip
    gated = replace(TunedConfig.untuned(trace.spec), gating=UniformCut(trace).table(0.2))
    sure = PrefetchTable([PrefetchSource("next_router", 1, np.ones((3, 2)))], buffer_slots=4)
    free = simulate(trace, gated, replace(hardware, gate_s=0.0)).ms_per_token
    assert simulate(trace, gated, hardware).ms_per_token == pytest.approx(free + 3)
    querying = simulate(trace, replace(gated, prefetch=sure), hardware).ms_per_token
    assert querying == pytest.approx(free + 3 + 2)
    ungated = replace(gated, gating=None, prefetch=sure)
    queried = simulate(trace, ungated, hardware).ms_per_token
    unqueried = simulate(trace, replace(ungated, prefetch=None), hardware).ms_per_token
    assert queried == pytest.approx(unqueried + 1)


def test_querying_takes_time_at_every_hook_point_and_more_at_a_layers_output():
    trace = make_trace(n_tokens=300)
    candidates = trace.predictions["next_router"]
    trace = replace(trace, predictions={"next_router": candidates, "own_norm": candidates})
    hardware = HardwareProfile(
        "cpu", "emulated:x", [1000], [0.0], 0.006, 0.0005,
        predict_s=0.0005, predict_overhead_s=0.001, predict_output_overhead_s=0.002,
    )  # fmt: skip
    plain = TunedConfig.untuned(trace.spec)
    unqueried = simulate(trace, plain, hardware).ms_per_token
    for names, spent_ms in (
        (["next_router"], 2 * (1 + 0.5)),
        (["own_norm"], 2 * (1 + 2 + 0.5)),
        (["next_router", "own_norm"], 2 * (1 + 0.5) + 2 * (1 + 2 + 0.5)),
    ):
        sources = [PrefetchSource(name, 1, np.ones((3, 2))) for name in names]
        querying = replace(plain, prefetch=PrefetchTable(sources, buffer_slots=4))
        queried = simulate(trace, querying, hardware).ms_per_token
        assert queried == pytest.approx(unqueried + spent_ms)


def test_predictions_that_were_not_recorded_are_refused():
    trace = make_trace()
    hardware = HardwareProfile("cpu", "emulated:x", [1000], [0.002], 0.006, 0.0005)
    unknown = PrefetchTable([PrefetchSource("next_router", 3, np.ones((3, 2)))], buffer_slots=4)
    config = replace(TunedConfig.untuned(trace.spec), prefetch=unknown)
    with pytest.raises(RecordError, match=r"no predictions of 'next_router' at distance 3"):
        simulate(trace, config, hardware)


def test_all_resident_costs_only_computing():
    trace = make_trace(make_spec(n_experts=4), n_tokens=300)
    hardware = HardwareProfile("cpu", "emulated:x", [1000], [9.0], 0.001, 0.0005)
    result = simulate(trace, TunedConfig.untuned(trace.spec), hardware, warmup_tokens=150)
    assert result.mean_hit_rate == 1.0
    assert result.ms_per_token == pytest.approx(1 + 3 * 2 * 0.5)


def test_predictions_charge_every_precision_its_time_to_compute():
    trace = make_trace()
    shape = trace.spec.n_layers, trace.spec.n_experts
    hardware = HardwareProfile(
        "cpu", "pcie", [100], [0.0], 0.1, 3e-5, {"experts_by_precision": {"int8": 24}},
        expert_s_by_precision={"float32": 4e-5, "int8": 2e-5, "int4": 1e-5},
    )  # fmt: skip

    def ms(name):
        plan = PrecisionPlan.uniform(name, shape, 1)
        config = replace(TunedConfig.untuned(trace.spec), precision=plan)
        return simulate(trace, config, hardware).ms_per_token

    n_run = trace.spec.n_layers * trace.spec.top_k
    assert ms("float32") - ms("int8") == pytest.approx(1e3 * n_run * 3e-5)
    assert ms("int4") == pytest.approx(1e3 * (0.1 + n_run * 1.5e-5))
