"""Fetching ahead changes when experts come, never what they compute."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import PROMPT, decode
from tiny_models import save_tiny

from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.transfer.clock import RealClock, VirtualClock
from adapmoe_lab.engine.transfer.link import EmulatedLink
from adapmoe_lab.policies.allocation.slots import N_STAGING, slots_plan
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.profiling.predictors.fit import fit_predictors
from adapmoe_lab.profiling.routing.recorder import RoutingRecorder
from adapmoe_lab.records import PrefetchSource, PrefetchTable, TunedConfig
from adapmoe_lab.records.step_costs import HostCosts, StepCosts
from adapmoe_lab.simulation.replay.recorded_candidates import recorded_candidates
from adapmoe_lab.simulation.replay.replay import replay
from adapmoe_lab.simulation.timing.timeline import run_timeline

UNFITTED = [("next_router", 1), ("next_router", 2), ("own_norm", 1), ("token_embedding", 0)]
FITTED = [("ridge", 1), ("ridge", 2), ("token_table", 0), ("last_hidden", 0)]
COSTS = StepCosts(HostCosts(dense_layer_s=2**-8, head_s=2**-9), expert_s=2**-11)


def following(spec, sources, fitted=None, buffer_slots=3):
    """Return a prefetch table that trusts every prediction."""
    sure = np.full((spec.n_layers, spec.top_k), 0.95)
    return PrefetchTable([PrefetchSource(*who, sure) for who in sources], buffer_slots, fitted)


def quick_link(model):
    """Let a virtual clock and link leave time between layers for two experts."""
    model.engine.step_costs = COSTS
    model.link.bytes_per_s = model.spec.stored_expert_bytes / 2**-9
    return model


def with_slots(model, slots, prefetch=None):
    plan = slots_plan(model.spec, slots)
    return replace(TunedConfig.untuned(model.spec), plan=plan, prefetch=prefetch)


@pytest.mark.parametrize("slots", [0, 1, 2])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_the_text_is_the_same(tmp_path, family, slots):
    folder = save_tiny(family, tmp_path / family)
    model = load(
        folder, device="cpu", link="none", dtype="float32", clock=VirtualClock(),
        announce=lambda _: None,
    )  # fmt: skip
    ids = torch.arange(3, 9)
    expected = decode(quick_link(model).hf, ids, 24)
    offered = {predictor.name for predictor in model.predictors()}
    sources = [who for who in UNFITTED if who[0] in offered]
    with model.running(with_slots(model, slots, following(model.spec, sources))):
        assert decode(model.hf, ids, 24) == expected
        traffic = model.engine.traffic
    assert traffic.prefetch_used.sum() > 0
    assert traffic.prefetch_wasted.sum() > 0


def test_fitted_predictors_are_followed_as_they_were_recorded(load_tiny, texts):
    model = quick_link(load_tiny(clock=VirtualClock()))
    fitted = fit_predictors(model, texts * 3)
    table = following(model.spec, FITTED, fitted)
    with model.running(with_slots(model, 1, table)):
        recorder = RoutingRecorder(model, model.predictors(fitted))
        model.engine.clock.spend(1.0)
        start = model.engine.clock.now()
        with recorder.recording():
            decode(model.hf, model.encode(PROMPT), 40)
        took, traffic = model.engine.clock.now() - start, model.engine.traffic
    trace = recorder.trace()
    candidates = recorded_candidates(trace, table)
    replayed = replay(
        trace, kept_experts(trace, None), slots_plan(model.spec, 1), "lru", candidates
    )
    costs = replace(COSTS, load_s=model.link.seconds, expert_bytes=model.store.expert_bytes)
    timeline = run_timeline(replayed, costs, candidates, table.buffer_slots)
    np.testing.assert_array_equal(timeline.used.sum(axis=0), traffic.prefetch_used)
    np.testing.assert_array_equal(timeline.wasted.sum(axis=0), traffic.prefetch_wasted)
    assert traffic.prefetch_used[0] > 0
    assert (timeline.ended_s[-1], timeline.n_bytes.sum()) == (took, traffic.bytes_moved)


def test_demands_are_counted_exactly_in_real_time(load_tiny):
    model = load_tiny(clock=RealClock())
    model.link.bytes_per_s = model.spec.stored_expert_bytes / 1e-4
    recorder = RoutingRecorder(model)
    with model.running(with_slots(model, 2)):
        with recorder.recording():
            decode(model.hf, model.encode(PROMPT), 30)
        traffic = model.engine.traffic
    trace = recorder.trace()
    replayed = replay(trace, kept_experts(trace, None), slots_plan(model.spec, 2))
    np.testing.assert_array_equal(replayed.hits.sum(axis=0), traffic.hits)
    np.testing.assert_array_equal(replayed.misses.sum(axis=0), traffic.misses)


class Stop(BaseException):
    """Stands for the interrupt that a kernel's stop button raises."""


@pytest.mark.parametrize("method", ["copy", "wait", "finish", "issue_prefetch", "begin_chunks"])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_an_interrupt_anywhere_leaves_nothing_wrong_behind(load_tiny, monkeypatch, method, at):
    model = quick_link(load_tiny(clock=VirtualClock()))
    prompt = model.encode(PROMPT)
    expected = decode(model.hf, prompt, 24)
    model.apply(with_slots(model, 1, following(model.spec, UNFITTED)))
    left, whole = at, getattr(EmulatedLink, method)

    def failing(*arguments, **named):
        nonlocal left
        left -= 1
        if left == 0:
            raise Stop
        return whole(*arguments, **named)

    monkeypatch.setattr(EmulatedLink, method, failing)
    with pytest.raises(Stop):
        decode(model.hf, prompt, 24)
    for _ in range(2):
        assert decode(model.hf, prompt, 24) == expected


def test_prefetches_are_forgotten_with_the_slots():
    clock = VirtualClock()
    link = EmulatedLink("emulated:x", clock, bytes_per_s=100.0)
    source, target = torch.arange(40, dtype=torch.uint8), torch.zeros(40, dtype=torch.uint8)
    copy = link.issue_prefetch(source, target, priority=0)
    clock.spend(0.25)  # two and a half chunks of a tenth of a second
    link.begin_chunks()
    assert (copy.n_begun, copy.bytes_begun) == (3, 30)
    assert torch.equal(target[:30], source[:30])
    assert not target[30:].any()
    link.drain()
    clock.spend(1.0)
    link.begin_chunks()
    assert copy.n_begun == 3


def test_the_most_urgent_goes_first_and_a_demand_before_all():
    clock = VirtualClock()
    link = EmulatedLink("emulated:x", clock, bytes_per_s=100.0)
    row = torch.zeros(40, dtype=torch.uint8)
    later = link.issue_prefetch(row, row.clone(), priority=2)
    sooner = link.issue_prefetch(row, row.clone(), priority=1)
    clock.spend(0.45)
    assert link.copy(row, row.clone()) == pytest.approx(0.5 + 0.4)
    assert (sooner.n_begun, later.n_begun) == (4, 1)
    link.finish(later)
    assert later.arrival == pytest.approx(0.9 + 0.3)
    assert later.is_whole


def test_a_predictor_that_the_model_lacks_is_named(load_tiny, monkeypatch):
    model = load_tiny()
    table = following(model.spec, [("own_norm", 1)])
    only = tuple(p for p in model.predictors() if p.name == "next_router")
    monkeypatch.setattr(model, "_kept_predictors", lambda fitted: only)
    with pytest.raises(ValueError, match=r"follows own_norm, which this model does not offer; it"):
        model.apply(with_slots(model, 1, table))


def test_the_buffer_is_in_the_memory_plan(load_tiny, tmp_path):
    model = load_tiny()
    config = with_slots(model, 2, following(model.spec, UNFITTED, buffer_slots=5))
    again = load_tiny(config=config.save(tmp_path / "tuned.json"))
    assert again.memory.prefetch_bytes == 5 * model.spec.stored_expert_bytes
    assert "prefetch: " in str(again.memory)
    slots = (2 * model.spec.n_layers + N_STAGING) * model.spec.stored_expert_bytes
    assert again.memory.slot_bytes == slots
    assert again.config.prefetch.fingerprint() == config.prefetch.fingerprint()
