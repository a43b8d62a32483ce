"""Steps of a captured graph: as the host-driven executor does them, counters and all.

On a GPU; without one in Triton's interpreter, as `tests/engine/test_graph_interpreted.py` does.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn_surrogates import random_surrogates
from forced_routing import drawn_tokens, forced_routing, random_choices, step_through
from interpreted_graph import (
    DEVICE,
    IS_INTERPRETED,
    NEEDS_DEVICE,
    counting_steps,
    load_graph,
)
from tiny_models import save_tiny
from toy_policies import TOY

from adapmoe_lab.engine.graph import captured_step
from adapmoe_lab.engine.graph.requirements import CaptureError
from adapmoe_lab.engine.host_driven.decoder import TransformersDecoder
from adapmoe_lab.engine.rounding import rounding_bound
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.eviction.policy import EvictionPolicy
from adapmoe_lab.policies.eviction.registry import POLICIES, register, unregister
from adapmoe_lab.records import CachePlan, GatingTable

pytestmark = NEEDS_DEVICE
N_PROMPT, N_STEPS = (4, 4) if IS_INTERPRETED else (12, 40)
FAMILIES = ["mixtral", *([] if IS_INTERPRETED else ["olmoe", "qwen2_moe", "qwen3_moe"])]
SLOTS = [3] if IS_INTERPRETED else [0, 1, 3, 5, 8]
ON_DEVICE = [policy for policy in [*POLICIES.values(), TOY] if not policy.host_only]
POOLS = [(p, is_global) for p in ON_DEVICE for is_global in (False, True)]
IN_TURN = [pool for number, pool in enumerate(POOLS) if number % 4 in (0, 3)]
"""Every policy, in slots by layer or shared: enough for the interpreter, which takes long."""

TOLERANCE = 3e-2 if IS_INTERPRETED else 6e-3
"""Of logits, relative: bfloat16 on a CPU, whose sums are of another order, or on a GPU."""


@pytest.fixture(autouse=True)
def captured():
    with counting_steps() as steps:
        yield steps


@pytest.fixture
def toy_policy():
    register(TOY)
    yield
    unregister(TOY.name)


@torch.no_grad()
def teacher_forced(model, decoder, ids, position):
    """Return the logits [N, V] of every step after the prompt, and the counters of the steps."""
    position.zero_()
    decoder.prefill(ids[:N_PROMPT])
    before = model.engine.traffic
    return step_through(decoder, ids, position, N_PROMPT), model.engine.traffic - before


def check_against_host(model, config, is_again=False):
    """Check that forced tokens count as on the host, with nearly its logits; return traffic."""
    spec = model.spec
    ids = drawn_tokens(N_PROMPT + N_STEPS)
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    choices = random_choices(spec.n_layers, len(ids), spec.n_experts, spec.top_k, DEVICE)
    with forced_routing(model, choices, position):
        model.apply(config)
        expected, of_host = teacher_forced(model, TransformersDecoder(model.hf), ids, position)
        model.apply(config)
        found, of_graph = teacher_forced(model, model.decoder(), ids, position)
        if is_again:  # with other experts resident
            again, _ = teacher_forced(model, model.decoder(), ids, position)
            assert torch.equal(found, again), "what is resident changes bits"
    for name in ("hits", "misses"):
        np.testing.assert_array_equal(getattr(of_graph, name), getattr(of_host, name), name)
    assert of_graph.bytes_moved == of_host.bytes_moved
    assert of_graph.n_steps == N_STEPS
    assert (of_graph.kept, of_graph.skipped) == (of_host.kept, of_host.skipped)
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < TOLERANCE
    return of_graph


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_those_of_the_host_in_counters_and_nearly_in_logits(tmp_path, family, slots):
    model = load_graph(save_tiny(family, tmp_path))
    config = replace(model.config, plan=slots_plan(model.spec, slots))
    check_against_host(model, config, is_again=True)


def test_experts_in_float16_are_served_too(tmp_path):
    model = load_graph(save_tiny("mixtral", tmp_path), dtype="float16", expert_dtype="float16")
    check_against_host(model, replace(model.config, plan=slots_plan(model.spec, 3)), is_again=True)


@pytest.mark.usefixtures("toy_policy")
@pytest.mark.parametrize(("policy", "is_global"), IN_TURN if IS_INTERPRETED else POOLS)
def test_every_policy_of_the_device_decides_as_on_the_host(tmp_path, policy, is_global):
    model = load_graph(save_tiny("mixtral", tmp_path))
    pinned = [{1}, (), {0, 5}] if policy.pins else None
    plan = CachePlan(np.array([2, 0, 4]), None, None, "given", is_global=is_global, pinned=pinned)
    check_against_host(model, replace(model.config, plan=plan, eviction=policy.name))


@pytest.mark.parametrize("is_renormalised", [False, True])
def test_what_is_skipped_is_what_the_host_skips(tmp_path, is_renormalised):
    model = load_graph(save_tiny("mixtral", tmp_path))
    gating = GatingTable(np.array([[0.6], [0.75], [2.0]]), is_renormalised)
    config = replace(model.config, plan=slots_plan(model.spec, 3), gating=gating)
    traffic = check_against_host(model, config)
    assert 0 < traffic.skipped < traffic.kept


def test_surrogates_take_the_place_of_what_is_skipped(tmp_path, captured):
    model = load_graph(save_tiny("mixtral", tmp_path))
    gating = GatingTable(np.array([[0.6], [0.75], [2.0]]))
    surrogates = random_surrogates(model.spec, ranks=[3, 0, 4])
    config = replace(
        model.config, plan=slots_plan(model.spec, 3), gating=gating, compensation=surrogates
    )
    traffic = check_against_host(model, config)
    assert 0 < traffic.skipped < traffic.kept
    model.apply(replace(config, compensation=None))
    model.decoder().step(1)
    assert len(captured) == 2, "without them it is another step"


def test_cuts_quotas_and_slots_change_without_another_capture(tmp_path, captured):
    model = load_graph(save_tiny("mixtral", tmp_path))
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    ids = drawn_tokens(N_PROMPT + 1)
    rng = np.random.default_rng(0)
    skipped = set()
    for number in range(5 if IS_INTERPRETED else 50):
        gating = GatingTable(rng.uniform(0.5, 1.1, (3, 1))) if number % 4 else None
        plan = CachePlan(rng.integers(0, 9, 3), None, None, "given")
        model.apply(replace(model.config, plan=plan, gating=gating))
        _, traffic = teacher_forced(model, model.decoder(), ids, position)
        assert traffic.kept + traffic.skipped == 3 * 2
        skipped.add(traffic.skipped)
    assert len(captured) == 1
    assert len(skipped) > 1
    model.apply(replace(model.config, eviction="lfu_aged"))
    teacher_forced(model, model.decoder(), ids, position)
    assert len(captured) == 2, "another policy is another kernel"


def wrongly_replayed(monkeypatch):
    """Let graphs replay the step that was recorded, wherever the sequence is."""
    record = captured_step.recorded

    def recorded(run, undo):
        graph, result = record(run, undo)
        graph.replay()
        first = result.clone()
        return SimpleNamespace(replay=lambda: result.copy_(first)), result

    monkeypatch.setattr(captured_step, "recorded", recorded)


def test_a_graph_that_replays_something_else_is_not_used(tmp_path, monkeypatch):
    folder, ids = save_tiny("mixtral", tmp_path), drawn_tokens(N_PROMPT + 2)
    model = load_graph(folder, executor="auto")
    wrongly_replayed(monkeypatch)
    refused = load_graph(folder).decoder()
    refused.prefill(ids[:-2])
    with pytest.raises(CaptureError, match=r"gives other logits than a plain one, by \d"):
        refused.step(1)
    assert model.engine.runs_steps_by == "graph"
    found, expected = model.decoder(), TransformersDecoder(model.hf)
    before = model.engine.traffic
    for decoder in (found, expected):
        decoder.prefill(ids[:-2])
    for token in ids[-2:].tolist():
        logits, wanted = found.step(token).float(), expected.step(token).float()
        assert (logits - wanted).norm() < TOLERANCE * wanted.norm()
    assert model.engine.runs_steps_by == "host"
    assert "steps are driven by the host: The captured step gives other logits" in repr(model)
    assert (model.engine.traffic - before).n_steps == 6
    model.apply(model.config)
    assert model.engine.runs_steps_by == "host", "it is not tried again"


def test_auto_leaves_to_the_host_what_no_graph_runs_and_takes_back_what_it_does(tmp_path, captured):
    model = load_graph(save_tiny("mixtral", tmp_path), executor="auto")
    ids = drawn_tokens(N_PROMPT + 1)
    counts = []
    for eviction, runs_by in (("lru", "graph"), ("hobbit", "host"), ("lru", "graph")):
        model.apply(replace(model.config, eviction=eviction))
        decoder = model.decoder()
        decoder.prefill(ids[:-1])
        decoder.step(int(ids[-1]))
        assert model.engine.runs_steps_by == runs_by
        assert measurement_conditions(model)["executor"] == runs_by
        assert ("executor='graph' does not run eviction 'hobbit'" in repr(model)) is (
            runs_by == "host"
        )
        counts.append(model.engine.traffic.n_steps)
    assert counts == [2, 2, 2]
    assert len(captured) == 2


def test_a_policy_that_does_not_compile_is_left_to_the_host_and_no_other(tmp_path):
    made = {}
    exec("def after_use(priority, state, use):\n    return 2 * use.clock, state\n", made)  # noqa: S102
    policy = EvictionPolicy("typed", made["after_use"])
    register(policy)
    try:
        model = load_graph(save_tiny("mixtral", tmp_path), executor="auto")
        model.apply(replace(model.config, eviction="typed"))
        decoder = model.decoder()
        decoder.prefill(drawn_tokens(3))
        decoder.step(1)
        assert model.engine.runs_steps_by == ("graph" if IS_INTERPRETED else "host")
        model.apply(replace(model.config, eviction="lru"))
        assert model.engine.runs_steps_by == "graph"
    finally:
        unregister("typed")


def test_nothing_is_captured_without_room_for_the_proof(tmp_path, captured):
    model = load_graph(save_tiny("mixtral", tmp_path))
    decoder, expected = model.decoder(), TransformersDecoder(model.hf)
    ids = drawn_tokens(128)
    for each in (decoder, expected):
        each.prefill(ids[:126])
    for token in ids[126:].tolist():
        logits, wanted = decoder.step(token).float(), expected.step(token).float()
        # the routers choose themselves, and the attention kernels differ
        assert (logits - wanted).norm() < rounding_bound(torch.bfloat16) * wanted.norm()
    assert not captured
    decoder = model.decoder()
    decoder.prefill(ids[:125])
    decoder.step(1)
    assert len(captured) == 1


def test_autocast_around_a_step_changes_nothing(tmp_path):
    model = load_graph(save_tiny("mixtral", tmp_path))
    ids, found = drawn_tokens(N_PROMPT + 1), []
    for is_enabled in (False, True):
        decoder = model.decoder()
        with torch.autocast(DEVICE, dtype=torch.float16, enabled=is_enabled):
            decoder.prefill(ids[:-1])
            found.append(decoder.step(int(ids[-1])).clone())
    assert torch.equal(*found)


def test_a_sequence_ends_where_other_slots_come_into_force(tmp_path):
    model = load_graph(save_tiny("mixtral", tmp_path))
    decoder = model.decoder()
    decoder.prefill(drawn_tokens(3))
    model.apply(replace(model.config, plan=slots_plan(model.spec, 1)))
    assert decoder.has_ended
    with pytest.raises(RuntimeError, match="the slots have changed"):
        decoder.step(1)
