"""Link and compute on a virtual clock: times follow from the counters exactly."""

import numpy as np
import pytest
import torch
from runs import PROMPT, half_cached

from adapmoe_lab.engine.clock import RealClock, VirtualClock
from adapmoe_lab.engine.decode import decode
from adapmoe_lab.engine.link import EmulatedLink
from adapmoe_lab.engine.offload import VirtualCosts
from adapmoe_lab.evaluation.latency import measure_latency
from adapmoe_lab.records import HardwareProfile
from adapmoe_lab.simulation.cost import layer_step_s


def paced(model, bytes_per_s):
    model.engine.link.bytes_per_s = bytes_per_s
    return model


def test_resident_experts_take_computing_only(load_tiny):
    model = load_tiny(clock=VirtualClock())
    model.engine.costs = VirtualCosts(dense_layer_s=1e-3, expert_s=1e-4)
    decode(model.hf, model.encode(PROMPT), 8)  # every expert that the next run needs is loaded
    start = model.engine.clock.now()
    decode(model.hf, model.encode(PROMPT)[:1], 1)
    spent = model.engine.clock.now() - start
    assert spent == pytest.approx(3 * (1e-3 + 2 * 1e-4))


def test_decode_time_equals_the_cost_model(load_tiny):
    model = half_cached(load_tiny(clock=VirtualClock()))
    costs = VirtualCosts(dense_layer_s=2e-3, expert_s=5e-4)
    model.engine.costs = costs
    expert_bytes = model.spec.stored_expert_bytes
    paced(model, bytes_per_s=expert_bytes / 3e-3)
    report = measure_latency(model, model.config, [PROMPT], new_tokens=30, repeats=2)
    model.apply(model.config)
    stamps, traffic = [], []

    def note(_):
        stamps.append(model.engine.clock.now())
        traffic.append(model.engine.traffic)

    decode(model.hf, model.encode(PROMPT), 20, after_step=note)
    for before, after, start, end in zip(traffic, traffic[1:], stamps, stamps[1:], strict=False):
        step = after - before
        load_s = np.full(3, 3e-3)
        busy = layer_step_s(step.hits, step.misses, step.misses * 0, load_s, costs.expert_s)
        assert end - start == pytest.approx(3 * costs.dense_layer_s + busy.sum())
    assert report.decode.unit == "s"


def test_two_runs_take_the_same_virtual_time(load_tiny):
    def seconds():
        model = paced(half_cached(load_tiny(clock=VirtualClock())), 1e6)
        report = measure_latency(model, model.config, [PROMPT], new_tokens=10, repeats=2)
        return report.decode.samples.tolist()

    assert seconds() == seconds()


def test_the_link_serves_one_copy_after_another():
    clock = VirtualClock()
    link = EmulatedLink("emulated:x", clock, bytes_per_s=100.0, latency_s=0.5)
    source, target = torch.arange(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)
    first, second = link.copy(source, target), link.copy(source, target)
    assert (first, second) == (pytest.approx(0.6), pytest.approx(1.2))
    assert torch.equal(source, target)
    link.wait(first)
    assert clock.now() == pytest.approx(0.6)
    clock.spend(5.0)
    assert link.copy(source, target) == pytest.approx(6.2)
    with link.unpaced():
        assert link.copy(source, target) == pytest.approx(6.2)


def test_the_real_clock_waits_at_least_as_long_as_asked():
    clock = RealClock()
    moment = clock.now() + 0.003
    clock.sleep_until(moment)
    assert clock.now() >= moment


def test_load_time_is_interpolated_between_measured_sizes():
    profile = HardwareProfile("cpu", "pcie", [100, 200], [1.0, 3.0], 0.1, 0.01)
    assert profile.load_s(150) == pytest.approx(2.0)
    assert profile.load_s(400) == pytest.approx(6.0)
