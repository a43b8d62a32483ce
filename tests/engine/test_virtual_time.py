"""Link and compute on a virtual clock: times follow from the counters exactly, and counters from
the recorded routing, for every eviction policy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import PROMPT, decode, half_cached
from toy_policies import TOY

from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.observing import observing
from adapmoe_lab.engine.transfer.clock import RealClock, VirtualClock
from adapmoe_lab.engine.transfer.link import EmulatedLink
from adapmoe_lab.evaluation.latency import measure_latency
from adapmoe_lab.evaluation.texts import calibration_texts
from adapmoe_lab.models.families import router_scores
from adapmoe_lab.models.hooks.key_value_cache import forward_cached
from adapmoe_lab.policies.allocation.slots import shared, slots_plan, with_pins
from adapmoe_lab.policies.eviction.registry import POLICIES, register, unregister
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.profiling.routing.recorder import RoutingRecorder
from adapmoe_lab.records import (
    GatingTable,
    HardwareProfile,
    Prediction,
    PrefetchSource,
    PrefetchTable,
    RoutingTrace,
    TunedConfig,
)
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.step_costs import HostCosts, StepCosts
from adapmoe_lab.simulation.replay.recorded_candidates import recorded_candidates
from adapmoe_lab.simulation.replay.replay import replay
from adapmoe_lab.simulation.timing.timeline import run_timeline

RUNNABLE = [name for name, policy in POLICIES.items() if not policy.needs_future] + ["toy"]


@pytest.fixture(autouse=True, scope="module")
def _toy():
    register(TOY)
    yield
    unregister(TOY.name)


def linked_at(model, bytes_per_s):
    model.link.bytes_per_s = bytes_per_s
    return model


def test_resident_experts_take_computing_only(load_tiny):
    model = load_tiny(clock=VirtualClock())
    model.engine.step_costs = StepCosts(HostCosts(dense_layer_s=1e-3), expert_s=1e-4)
    decode(model.hf, model.encode(PROMPT), 8)  # every expert that the next run needs is loaded
    start = model.engine.clock.now()
    decode(model.hf, model.encode(PROMPT)[:1], 1)
    spent = model.engine.clock.now() - start
    assert spent == pytest.approx(3 * (1e-3 + 2 * 1e-4))


def test_two_runs_take_the_same_virtual_time(load_tiny):
    def seconds():
        model = linked_at(half_cached(load_tiny(clock=VirtualClock())), 1e6)
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
    with link.without_link_delay():
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


COSTS = StepCosts(HostCosts(dense_layer_s=2**-10, head_s=2**-11), expert_s=2**-13)
"""Powers of two, so that sums on the engine's clock and on one from zero are the same."""


@pytest.fixture(scope="module")
def demo():
    model = load(
        "demo", dtype="float32", device="cpu", link="none", clock=VirtualClock(),
        announce=lambda _: None,
    )  # fmt: skip
    model.engine.step_costs = COSTS
    return linked_at(model, bytes_per_s=2**29)


@pytest.fixture(scope="module")
def mixed():
    """Return the demo with experts of two precisions, each computed in a time of its own."""
    layout = [["float32", "int4"] * 4, ["int4", "int4", "float32", "int4"] * 2] * 4
    model = load(
        "demo", dtype="float32", expert_dtype=layout, device="cpu", link="none",
        clock=VirtualClock(), announce=lambda _: None,
    )  # fmt: skip
    expert_s = [[(1 + (3 * e + n) % 7) * 2**-13 for e in range(8)] for n in range(8)]
    model.engine.step_costs = replace(COSTS, expert_s=expert_s)
    return linked_at(model, bytes_per_s=2**29)


def config_of(model, eviction, is_global, prefetch=None):
    """Return a gated config with zero to seven slots per layer, or as many in one pool."""
    spec = model.spec
    plan = replace(slots_plan(spec, 4), slots=[4, 5, 0, 3, 2, 7, 4, 1])
    plan = shared(plan) if is_global else plan
    if eviction == "static":
        uses = np.arange(64).reshape(8, 8) % 5
        plan = with_pins(replace(plan, slots=np.maximum(plan.slots - 1, 0)), uses)
    gating = GatingTable.per_layer(np.full(8, 0.85), spec.top_k)
    untuned = TunedConfig.untuned(spec)
    return replace(untuned, plan=plan, gating=gating, eviction=eviction, prefetch=prefetch)


def following(*sources, buffer_slots=6):
    """Return a prefetch table of (predictor, distance), trusted less in later layers."""
    probability = np.linspace(0.9, 0.5, 8)[:, None] * [1, 0.8]
    return PrefetchTable([PrefetchSource(*source, probability) for source in sources], buffer_slots)


NEXT_THREE = [("next_router", 1), ("next_router", 2), ("next_router", 3)]
ALL_UNFITTED = [*NEXT_THREE, ("own_norm", 1), ("token_embedding", 0)]


def decode_batch(model, prompts, n_steps):
    """Continue a batch of prompts of one length greedily; return the trace of what was routed."""
    passes = []
    ids, cache = torch.stack(prompts), None
    with torch.no_grad(), observing(model, {HookPoint.EXPERTS_OUTPUT: passes.append}):
        for _ in range(n_steps):
            logits, cache = forward_cached(model.hf, ids, cache)
            ids = logits[:, -1:].argmax(-1)
    n_layers = model.spec.n_layers
    steps = [passes[first : first + n_layers] for first in range(0, len(passes), n_layers)]
    rows = [len(step[0].indices) for step in steps]

    def stacked(of_layer):
        return np.concatenate([np.stack([of_layer(p) for p in step], axis=1) for step in steps])

    routers = [layer.router for layer in model.layers]

    def predicted(distance):
        """Return what every layer's router predicts from the experts' input so many before."""
        experts, scores = np.full((2, sum(rows), n_layers, 2), -1.0)
        ends = np.cumsum(rows)
        for step, end in zip(steps, ends, strict=True):
            for source in step[: n_layers - distance]:
                target = source.layer + distance
                best = router_scores(routers[target], source.hidden).topk(2)
                experts[end - len(source.hidden) : end, target] = best.indices
                scores[end - len(source.hidden) : end, target] = best.values
        return Prediction(experts, scores)

    return RoutingTrace(
        spec=model.spec,
        token_ids=np.zeros(sum(rows)),
        expert_indices=stacked(lambda p: p.indices),
        weights=stacked(lambda p: p.weights),
        router_probs=stacked(lambda p: router_scores(routers[p.layer], p.hidden).numpy()),
        predictions={"next_router": {distance: predicted(distance) for distance in (1, 2, 3)}},
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


def run_and_replay(model, config, run):
    """Run a config and replay what was routed; return both accounts, and the times they took."""
    engine, table = model.engine, config.prefetch
    prompts = [model.encode(text)[:16] for text in calibration_texts()[:3]]
    with model.running(config):
        engine.clock.spend(1.0)  # the link is idle by then
        start = engine.clock.now()
        trace = run(model, prompts, 12)
        traffic, took = engine.traffic, engine.clock.now() - start
    candidates = recorded_candidates(trace, table, config.gating)
    keep = kept_experts(trace, config.gating)
    replayed = replay(trace, keep, config.plan, config.eviction, candidates)
    costs = replace(
        engine.step_costs, load_s=model.link.seconds, expert_bytes=model.store.expert_bytes
    )
    timeline = run_timeline(replayed, costs, candidates, table.buffer_slots if table else 0)
    return traffic, took, replayed, timeline


def assert_equal_accounts(traffic, took, replayed, timeline):
    np.testing.assert_array_equal(replayed.hits.sum(axis=0), traffic.hits)
    used = timeline.used.sum(axis=0)
    np.testing.assert_array_equal(used, traffic.prefetch_used)
    np.testing.assert_array_equal(replayed.misses.sum(axis=0) - used, traffic.misses)
    np.testing.assert_array_equal(timeline.wasted.sum(axis=0), traffic.prefetch_wasted)
    assert timeline.n_bytes.sum() == traffic.bytes_moved
    assert timeline.ended_s[-1] == took
    assert traffic.hits.sum() > 0
    assert traffic.skipped > 0


@pytest.mark.parametrize("run", [decode_alone, decode_batch])
@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("eviction", RUNNABLE)
def test_replay_counts_and_times_what_the_engine_does(demo, eviction, is_global, run):
    accounts = run_and_replay(demo, config_of(demo, eviction, is_global), run)
    assert_equal_accounts(*accounts)
    assert not accounts[0].prefetch_used.any()


@pytest.mark.parametrize("load_s", [2**-12, 2**-9, 2**-7])
@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize(
    ("run", "sources"),
    [(decode_alone, ALL_UNFITTED), (decode_alone, NEXT_THREE[:1]), (decode_batch, NEXT_THREE)],
)
def test_fetching_ahead_is_counted_and_timed_alike(demo, is_global, load_s, run, sources):
    linked_at(demo, demo.spec.stored_expert_bytes / load_s)
    config = config_of(demo, "lru", is_global, following(*sources))
    accounts = run_and_replay(demo, config, run)
    assert_equal_accounts(*accounts)
    assert accounts[0].prefetch_used.sum() > 0
    without, took, *_ = run_and_replay(demo, replace(config, prefetch=None), run)
    np.testing.assert_array_equal(without.hits, accounts[0].hits)
    assert accounts[1] < took


@pytest.mark.parametrize("load_s", [2**-12, 2**-9, 2**-7])
@pytest.mark.parametrize("sources", [ALL_UNFITTED, NEXT_THREE])
def test_querying_takes_time_and_changes_no_decision(demo, monkeypatch, load_s, sources):
    linked_at(demo, demo.spec.stored_expert_bytes / load_s)
    config = config_of(demo, "lru", False, following(*sources))
    at_once = run_and_replay(demo, config, decode_alone)
    host = COSTS.host._replace(
        predict_overhead_s=2**-12, predict_s=2**-14, predict_output_overhead_s=2**-13
    )
    monkeypatch.setattr(demo.engine, "step_costs", replace(COSTS, host=host))
    accounts = run_and_replay(demo, config, decode_alone)
    assert_equal_accounts(*accounts)
    assert accounts[0].prefetch_used.sum() >= at_once[0].prefetch_used.sum() > 0
    assert accounts[1] > at_once[1]


@pytest.mark.parametrize("eviction", RUNNABLE)
def test_fetching_ahead_leaves_every_policy_as_it_is(demo, eviction):
    config = config_of(demo, eviction, True, following(*ALL_UNFITTED, buffer_slots=2))
    assert_equal_accounts(*run_and_replay(demo, config, decode_alone))


@pytest.mark.parametrize("sources", [None, ALL_UNFITTED])
@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("run", [decode_alone, decode_batch])
def test_unlike_experts_are_counted_and_timed_alike(mixed, run, is_global, sources):
    if run is decode_batch and sources is not None:
        sources = NEXT_THREE
    table = following(*sources) if sources is not None else None
    accounts = run_and_replay(mixed, config_of(mixed, "lru", is_global, table), run)
    assert_equal_accounts(*accounts)
    assert bool(accounts[0].prefetch_used.any()) == (sources is not None)
