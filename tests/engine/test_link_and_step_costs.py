"""What a link and a config bring with them goes with them: speeds, step costs, counters."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import PROMPT, decode, half_cached

from adapmoe_lab.engine import lab_model
from adapmoe_lab.engine.loading import known_targets, link_target
from adapmoe_lab.engine.observing import observing
from adapmoe_lab.engine.transfer.clock import VirtualClock
from adapmoe_lab.records import (
    OFF,
    GatingTable,
    HardwareProfile,
    PrefetchSource,
    PrefetchTable,
    TunedConfig,
)
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.step_costs import HostCosts, StepCosts

MEASURED_S = 0.25
CPU = torch.device("cpu")


def state(link):
    return link.name, link.bytes_per_s, link.latency_s


@pytest.fixture
def target():
    return link_target(known_targets()[0], CPU)


@pytest.fixture
def probe_calls(monkeypatch):
    """Let decoding without a link take a known time; return how often it was measured."""
    calls = []

    def measured(*_):
        calls.append(1)
        return MEASURED_S

    monkeypatch.setattr(lab_model, "resident_layer_s", measured)
    return calls


def test_a_model_is_linked_for_a_while_and_then_as_before(load_tiny, target, probe_calls):
    model = load_tiny()
    before = state(model.link)
    with model.linked(target) as linked:
        assert linked is model
        name, bytes_per_s, _ = state(model.link)
        assert name == f"emulated:{target.name}"
        load_s = model.spec.stored_expert_bytes / bytes_per_s
        assert load_s == pytest.approx(MEASURED_S * target.load_ratio)
        with model.linked(None):
            assert state(model.link) == ("none", float("inf"), 0.0)
        assert model.link.name == name
    assert state(model.link) == before


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_link_as_before(load_tiny, target, probe_calls, monkeypatch, stop):
    model = load_tiny(link=target.name)
    before = state(model.link)
    with pytest.raises(stop), model.linked(None):
        raise stop

    def stopped(*_):
        raise stop

    monkeypatch.setattr(lab_model, "resident_layer_s", stopped)
    with pytest.raises(stop), model.linked(target):
        pytest.fail("the link was not measured")
    assert state(model.link) == before


def test_without_a_link_loads_take_no_time(load_tiny):
    model = half_cached(load_tiny(clock=VirtualClock()))
    model.link.emulate("emulated:slow", bytes_per_s=1.0)
    ids = model.encode(PROMPT)
    with model.linked(None):
        decode(model.hf, ids, 4)
        assert model.engine.clock.now() == 0.0
        assert model.engine.traffic.misses.sum() > 0
    decode(model.hf, ids, 4)
    assert model.engine.clock.now() > 1.0


def test_a_virtual_clock_cannot_tell_a_layers_time(load_tiny, target):
    with pytest.raises(ValueError, match=r"virtual clock .* has no step costs .* link='none'"):
        load_tiny(link=target.name, clock=VirtualClock())


def test_a_link_is_as_fast_whatever_config_is_in_force(load_tiny, target):
    """A layer that skips experts is quicker; the machine that is imitated skips none."""
    model = load_tiny(clock=VirtualClock())
    model.engine.step_costs = StepCosts(HostCosts(dense_layer_s=1e-3), expert_s=1e-4)
    with model.linked(target):
        plain = state(model.link)
    skipping = GatingTable.per_layer([0.0] * 3, top_k=2)
    model.apply(replace(TunedConfig.untuned(model.spec), gating=skipping))
    decode(model.hf, model.encode(PROMPT), 4)
    before, seen = model.engine.traffic.to_json(), []
    with observing(model, {HookPoint.EXPERTS_OUTPUT: seen.append}), model.linked(target):
        assert state(model.link) == (plain[0], pytest.approx(plain[1]), plain[2])
    assert (model.engine.traffic.to_json(), seen) == (before, [])


def prefetching(model, hardware=None):
    sure = np.full((model.spec.n_layers, model.spec.top_k), 0.9)
    table = PrefetchTable([PrefetchSource("next_router", 1, sure)], 2)
    return replace(TunedConfig.untuned(model.spec), prefetch=table, hardware=hardware)


def test_step_costs_are_those_of_the_config_that_is_applied(load_tiny, probe_calls):
    slow = HardwareProfile("slow", "pcie", [1000], [5.0], dense_step_s=30.0, expert_s=2.0)
    fast = HardwareProfile("fast", "pcie", [1000], [1e-3], 3e-3, 1e-4, gate_s=1e-3)
    fresh = load_tiny()
    fresh.apply(prefetching(fresh))
    measured = fresh.engine.step_costs
    assert measured.host == HostCosts(dense_layer_s=MEASURED_S)
    model = load_tiny()
    for hardware, dense_layer_s in ((slow, 10.0), (fast, 1e-3), (slow, 10.0)):
        model.apply(prefetching(model, hardware))
        assert model.engine.step_costs.host.dense_layer_s == pytest.approx(dense_layer_s)
        assert model.engine.step_costs.load_s(1000) == hardware.load_s(1000)
        model.apply(prefetching(model))
        assert model.engine.step_costs.host == measured.host
        assert model.engine._cached.prefetcher.step_costs is model.engine.step_costs
    gating = GatingTable.per_layer([OFF] * 3, top_k=2)
    with model.running(replace(prefetching(model, fast), gating=gating)):
        assert model.engine.step_costs.host.dense_layer_s == pytest.approx(2e-3)
    assert model.engine.step_costs.host == measured.host
    model.apply(TunedConfig.untuned(model.spec))
    assert model.engine.step_costs.host == HostCosts()
    assert len(probe_calls) == 2  # once for each model


def test_a_virtual_clocks_step_costs_are_the_users(load_tiny):
    model = load_tiny(clock=VirtualClock())
    model.engine.step_costs = costs = StepCosts(HostCosts(dense_layer_s=1e-3))
    model.apply(prefetching(model, HardwareProfile("slow", "pcie", [1000], [5.0], 30.0, 2.0)))
    model.apply(TunedConfig.untuned(model.spec))
    assert model.engine.step_costs is costs
