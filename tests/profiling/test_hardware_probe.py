"""The probe finds what a virtual machine was made of, and leaves a real one as it was."""

import time
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import save_tiny_mixtral
from runs import PROMPT, half_cached

from adapmoe_lab.engine.generation.tokens import generate_tokens
from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.transfer.clock import VirtualClock
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.profiling.hardware.machine_times import interleaved_medians
from adapmoe_lab.profiling.hardware.probe import probe_hardware
from adapmoe_lab.profiling.routing.recorder import RoutingRecorder
from adapmoe_lab.records import GatingTable, PrefetchSource, PrefetchTable, TunedConfig
from adapmoe_lab.records.step_costs import HostCosts, StepCosts
from adapmoe_lab.simulation.simulate import simulate

COSTS = StepCosts(HostCosts(dense_layer_s=2e-3), expert_s=5e-4)
LOAD_S = 3e-3


def virtual(load_tiny, **arguments):
    """Return a model on a virtual machine that takes `COSTS` and loads an expert in `LOAD_S`."""
    model = load_tiny(clock=VirtualClock(), **arguments)
    model.engine.step_costs = COSTS
    model.link.name = "emulated:virtual"
    model.link.bytes_per_s = model.spec.stored_expert_bytes / LOAD_S
    return model


@pytest.mark.parametrize("expert_memory", [None, "75%", "42%"])
def test_it_finds_the_costs_of_a_virtual_machine(load_tiny, expert_memory):
    model = virtual(load_tiny, expert_memory=expert_memory)
    hardware = probe_hardware(model, n_steps=8, rounds=2)
    assert hardware.dense_step_s == pytest.approx(model.spec.n_layers * COSTS.host.dense_layer_s)
    assert hardware.expert_s == pytest.approx(COSTS.expert_s)
    assert hardware.load_s(model.spec.stored_expert_bytes) == pytest.approx(LOAD_S)
    assert hardware.link_bytes_per_s == pytest.approx(model.link.bytes_per_s)
    assert hardware.miss_s == pytest.approx(0, abs=1e-12)
    no_part = hardware.gate_s, hardware.predict_s, hardware.gated_predict_s
    no_part += hardware.predict_overhead_s, hardware.predict_output_overhead_s
    assert no_part == pytest.approx((0, 0, 0, 0, 0), abs=1e-9)
    assert hardware.wait_s == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("has_prefetch", [False, True])
def test_it_finds_what_querying_takes_whatever_is_prefetched(load_tiny, has_prefetch):
    model = virtual(load_tiny)
    if has_prefetch:
        table = PrefetchTable([PrefetchSource("own_norm", 1, np.zeros((3, 2)))], buffer_slots=1)
        model.apply(replace(TunedConfig.untuned(model.spec), prefetch=table))
    host = COSTS.host._replace(
        predict_s=2e-4, predict_overhead_s=5e-4, predict_output_overhead_s=8e-4
    )
    model.engine.step_costs = replace(COSTS, host=host)
    hardware = probe_hardware(model, n_steps=12, rounds=2)
    assert hardware.dense_step_s == pytest.approx(model.spec.n_layers * COSTS.host.dense_layer_s)
    assert hardware.step_costs(model.spec.precision).host == pytest.approx(host, abs=1e-9)
    assert hardware.gated_predict_s == pytest.approx(host.predict_s)


def test_from_it_the_time_of_a_virtual_run_is_predicted(load_tiny):
    model = virtual(load_tiny)
    hardware = probe_hardware(model, n_steps=8, rounds=2)
    half_cached(model)
    recorder = RoutingRecorder(model)
    with recorder.recording():
        tokens = generate_tokens(model.decoder(), model.encode(PROMPT)[:1], 30)
        stamps = [model.engine.clock.now() for _ in tokens]
    predicted = simulate(recorder.trace(), model.config, hardware, warmup_tokens=1)
    assert predicted.ms_per_token == pytest.approx(1e3 * np.diff(stamps).mean())


def test_it_uses_the_memory_that_was_given_and_restores_the_configuration(load_tiny):
    model = load_tiny(expert_memory="75%")
    gating = GatingTable.per_layer(np.full(3, 0.8), 2)
    config = replace(TunedConfig.untuned(model.spec), gating=gating, plan=slots_plan(model.spec, 1))
    model.apply(config)
    used = []
    configure = model.engine.configure
    model.engine.configure = lambda gating, plan, *rest, **ahead: (
        used.append(plan.slots),
        configure(gating, plan, *rest, **ahead),
    )
    hardware = probe_hardware(model, n_steps=12, rounds=3)
    assert all((slots <= model.memory.slots.slots).all() for slots in used)
    assert model.config is config
    assert model.engine.gating is gating
    assert model.engine.plan is config.plan
    assert hardware.link == "none"


def test_where_the_router_chooses_one_expert_it_takes_what_it_takes_alone(tmp_path):
    model = load(save_tiny_mixtral(tmp_path, top_k=1), device="cpu", link="none")
    hardware = probe_hardware(model, n_steps=12, rounds=3)
    assert hardware.expert_s == hardware.expert_s_by_precision["float32"] > 0
    assert hardware.dense_step_s > 0


def test_it_measures_every_part_on_a_cpu(load_tiny):
    hardware = probe_hardware(load_tiny(expert_dtype="int8"), n_steps=24, rounds=3)
    assert set(hardware.expert_s_by_precision) == {"int8", "bfloat16", "int4"}
    assert min(hardware.expert_s_by_precision.values()) > 0
    assert min(hardware.dense_step_s, hardware.layer_host_s, hardware.host_copy_s) > 0
    assert (
        min(
            hardware.predict_overhead_s + hardware.predict_s,
            hardware.predict_overhead_s + hardware.gated_predict_s,
        )
        > 0
    )
    assert hardware.layer_host_s * 3 < hardware.dense_step_s
    assert hardware.host_memory_bytes_per_s > 1e8
    assert hardware.host_matmul_bytes_per_s > 1e8
    assert hardware.wait_s is None  # nothing is held without an emulated link
    only_on_cuda = hardware.pageable_copy_s, hardware.host_sync_s, hardware.launch_s
    assert only_on_cuda == (None, None, None)


def test_works_take_turns_and_the_first_turn_does_not_count():
    done = []

    def work(name, seconds):
        times = iter(seconds)
        return lambda: done.append(name) or next(times)

    medians = interleaved_medians(
        {"a": work("a", [9.0] + [1.0] * 20), "b": work("b", [9.0] + [2.0, 4.0] * 10)}, budget_s=60
    )
    assert medians == {"a": 1.0, "b": 3.0}
    assert done[:4] == ["a", "b", "a", "b"]


@pytest.mark.slow
def test_the_demo_is_probed_in_twenty_seconds():
    model = load("demo", dtype="float32", device="cpu", announce=lambda _: None)
    start = time.monotonic()
    hardware = probe_hardware(model)
    assert time.monotonic() - start < 20
    assert hardware.is_emulated
    assert hardware.link_bytes_per_s == pytest.approx(model.link.bytes_per_s, rel=0.1)
