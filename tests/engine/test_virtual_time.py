"""Link and compute on a virtual clock: times follow from the counters exactly, and counters from
the recorded routing, for every eviction policy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import PROMPT, half_cached

from adapmoe_lab.engine.clock import RealClock, VirtualClock
from adapmoe_lab.engine.decode import decode
from adapmoe_lab.engine.link import EmulatedLink
from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.offload import VirtualCosts
from adapmoe_lab.evaluation.latency import measure_latency
from adapmoe_lab.evaluation.texts import calibration_texts
from adapmoe_lab.models.families import router_scores
from adapmoe_lab.policies.allocation import shared, slots_plan, with_pins
from adapmoe_lab.policies.gating import kept_experts
from adapmoe_lab.profiling.recorder import RoutingRecorder
from adapmoe_lab.records import GatingTable, HardwareProfile, RoutingTrace, TunedConfig
from adapmoe_lab.records.config import EVICTION_POLICIES
from adapmoe_lab.simulation.cost import layer_step_s
from adapmoe_lab.simulation.replay import replay


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


@pytest.fixture(scope="module")
def demo():
    model = load(
        "demo", dtype="float32", device="cpu", link="none", clock=VirtualClock(),
        announce=lambda _: None,
    )  # fmt: skip
    return paced(model, bytes_per_s=1e9)


def config_of(model, eviction, is_global):
    """Return a gated config with zero to seven slots per layer, or as many in one pool."""
    spec = model.spec
    plan = replace(slots_plan(spec, 4), slots=[4, 5, 0, 3, 2, 7, 4, 1])
    plan = shared(plan) if is_global else plan
    if eviction == "static":
        uses = np.arange(64).reshape(8, 8) % 5
        plan = with_pins(replace(plan, slots=np.maximum(plan.slots - 1, 0)), uses)
    gating = GatingTable.per_layer(np.full(8, 0.85), spec.top_k)
    untuned = TunedConfig.untuned(spec)
    return replace(untuned, plan=plan, gating=gating, eviction=eviction)


def decode_batch(model, prompts, n_steps):
    """Continue a batch of prompts of one length greedily; return the trace of what was routed."""
    passes = []
    ids, cache = torch.stack(prompts), None
    with torch.no_grad(), model.engine.observed_by(passes.append):
        for _ in range(n_steps):
            output = model.hf(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
    n_layers = model.spec.n_layers
    steps = [passes[first : first + n_layers] for first in range(0, len(passes), n_layers)]
    rows = [len(step[0].indices) for step in steps]

    def stacked(of_layer):
        return np.concatenate([np.stack([of_layer(p) for p in step], axis=1) for step in steps])

    routers = [layer.router for layer in model.layers]
    return RoutingTrace(
        spec=model.spec,
        token_ids=np.zeros(sum(rows)),
        expert_indices=stacked(lambda p: p.indices),
        weights=stacked(lambda p: p.weights),
        router_probs=stacked(lambda p: router_scores(routers[p.layer], p.hidden).numpy()),
        predictions={},
        sequence_starts=[0],
        step_ids=np.repeat(np.arange(len(rows)), rows),
        is_decode=np.zeros(sum(rows), dtype=bool),
        labels=("batch",),
    )


def decode_alone(model, prompts, n_steps):
    """Continue prompts one after another; return the trace of what was routed."""
    recorder = RoutingRecorder(model)
    with recorder.recording():
        for prompt in prompts:
            decode(model.hf, prompt, n_steps)
    return recorder.trace()


@pytest.mark.parametrize("run", [decode_alone, decode_batch])
@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("eviction", EVICTION_POLICIES)
def test_replay_counts_what_the_engine_counted(demo, eviction, is_global, run):
    prompts = [demo.encode(text)[:16] for text in calibration_texts()[:3]]
    config = config_of(demo, eviction, is_global)
    with demo.running(config):
        trace = run(demo, prompts, 12)
        traffic = demo.engine.traffic
    replayed = replay(trace, kept_experts(trace, config.gating), config.plan, eviction)
    np.testing.assert_array_equal(replayed.hits.sum(axis=0), traffic.hits)
    np.testing.assert_array_equal(replayed.misses.sum(axis=0), traffic.misses)
    assert replayed.misses.sum() * demo.spec.stored_expert_bytes == traffic.bytes_moved
    assert traffic.hits.sum() > 0
    assert traffic.skipped > 0
