"""The engine against the unmodified model, a written-out gated reference, and a plain replay."""

from dataclasses import replace
from types import MethodType

import numpy as np
import pytest
import torch
from replays import step_by_step
from runs import decode
from transformers import AutoModelForCausalLM

from adapmoe_lab.engine.host_driven.executor import HostDrivenExecutor
from adapmoe_lab.engine.observing import observing
from adapmoe_lab.models.families import Router, UnsupportedModelError
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.profiling.routing.recorder import RoutingRecorder
from adapmoe_lab.records import GatingTable, TunedConfig
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.simulation.replay.replay import replay

PROMPT = "Once upon a time there was a king who"
N_NEW = 24


def config_of(model, slots=None, cuts=None, renormalise=False):
    config = TunedConfig.untuned(model.spec)
    if slots is not None:
        config = replace(config, plan=slots_plan(model.spec, slots))
    if cuts is not None:
        config = replace(config, gating=GatingTable.per_layer(cuts, model.spec.top_k, renormalise))
    return config


def gated_experts(experts, cut, renormalise):
    """Return an experts forward that skips by one cut on the share, written out token by token."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for token in range(len(hidden_states)):
            weights = top_k_weights[token].float()
            best_first = torch.argsort(weights, descending=True, stable=True).tolist()
            kept, reached = [], 0.0
            for column in best_first:
                kept.append(column)
                reached += float(weights[column] / weights.sum())
                if reached >= cut:
                    break
            scale = weights.sum() / weights[kept].sum() if renormalise else 1.0
            for column in kept:
                expert = int(top_k_index[token, column])
                gate, up = (self.gate_up_proj[expert] @ hidden_states[token]).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                output[token] += scale * weights[column] * (self.down_proj[expert] @ inner)
        return output

    return MethodType(forward, experts)


@pytest.mark.parametrize("slots", [0, 1, 2, 3, 4])
def test_equals_the_unmodified_model_at_every_cache_size(tiny_checkpoint, load_tiny, slots):
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    model = load_tiny()
    model.apply(config_of(model, slots))
    ids = model.encode(PROMPT)
    with torch.no_grad():
        difference = (model.hf(ids[None]).logits - plain(ids[None]).logits).abs().max()
    assert difference <= 1e-5
    assert decode(model.hf, ids, N_NEW) == decode(plain, ids, N_NEW)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("cut", [0.0, 0.6, 0.8])
def test_gating_equals_a_written_out_reference(tiny_checkpoint, load_tiny, cut, slots, renormalise):
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    for layer in plain.model.layers:
        layer.mlp.experts.forward = gated_experts(layer.mlp.experts, cut, renormalise)
    model = load_tiny()
    model.apply(config_of(model, slots, [cut] * 3, renormalise))
    ids = model.encode(PROMPT)
    with torch.no_grad():
        difference = (model.hf(ids[None]).logits - plain(ids[None]).logits).abs().max()
    assert difference <= 1e-5
    assert decode(model.hf, ids, N_NEW) == decode(plain, ids, N_NEW)
    assert cut == 0.8 or model.engine.traffic.skipped > 0


@pytest.mark.parametrize("cuts", [None, [0.7, 2.0, 0.6]])
@pytest.mark.parametrize("slots", [0, 1, 2, 3, 4])
def test_counters_equal_a_plain_replay_of_the_recorded_run(load_tiny, slots, cuts):
    model = load_tiny()
    model.apply(config_of(model, slots, cuts))
    recorder = RoutingRecorder(model)
    with recorder.recording():
        for text in (PROMPT, "def f(x):"):
            decode(model.hf, model.encode(text), N_NEW)
    trace = recorder.trace()
    assert trace.is_decode.sum() == 2 * (N_NEW - 1)
    hits, misses = step_by_step(trace, cuts or [2.0] * 3, slots)
    traffic = model.engine.traffic
    np.testing.assert_array_equal(traffic.hits, hits.sum(axis=0))
    np.testing.assert_array_equal(traffic.misses, misses.sum(axis=0))
    simulated = replay(trace, kept_experts(trace, model.config.gating), model.config.plan)
    np.testing.assert_array_equal(simulated.hits, hits)
    np.testing.assert_array_equal(simulated.misses, misses)
    expert_bytes = model.spec.stored_expert_bytes
    assert traffic.bytes_moved == misses.sum() * expert_bytes


def test_an_observer_sees_what_was_computed(load_tiny):
    model = load_tiny()
    model.apply(config_of(model, 2, [0.7] * 3))
    passes = []
    with torch.no_grad(), observing(model, {HookPoint.EXPERTS_OUTPUT: passes.append}):
        model.hf(model.encode(PROMPT)[None])
    assert [p.layer for p in passes] == [0, 1, 2]
    for seen in passes:
        torch.testing.assert_close(seen.contributions.sum(dim=1), seen.output)
        assert (seen.contributions.abs().sum(-1) > 0).numpy().tolist() == seen.keep.tolist()
    model.hf(model.encode(PROMPT)[None])
    assert len(passes) == 3


def test_scores_that_cannot_be_had_are_refused_before_anything_runs(load_tiny):
    model = load_tiny()
    engine = model.engine
    router = Router(torch.nn.Linear(4, 4), 4, reads_experts_input=False)
    other = HostDrivenExecutor(
        model.store, model.link, engine.clock, engine.device, torch.float32, [router] * 3
    )
    plan = slots_plan(load_tiny().spec, 2)
    with pytest.raises(UnsupportedModelError, match="'router_average' reads the router's scores"):
        other.configure(None, plan, "router_average")
    other.configure(None, plan, "lfu_aged")
