"""Compiled steps, the hooks that a graph holds, and tokens chosen by one.

On a GPU; without one in Triton's interpreter, as `tests/engine/test_graph_interpreted.py` does.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from forced_routing import drawn_tokens, forced_routing, random_choices, step_through
from interpreted_graph import (
    DEVICE,
    IS_INTERPRETED,
    NEEDS_DEVICE,
    counting_captures,
    counting_steps,
    load_graph,
)
from tiny_models import save_tiny
from torch._inductor.utils import run_and_get_code

from adapmoe_lab.engine.generation.tokens import generate_tokens
from adapmoe_lab.engine.graph import captured_step
from adapmoe_lab.engine.graph.captured_choice import ReplayedSampler
from adapmoe_lab.engine.graph.compiling import CompileWarning
from adapmoe_lab.engine.graph.requirements import CaptureError
from adapmoe_lab.engine.rounding import rounding_bound
from adapmoe_lab.engine.sampling import Sampler, Sampling
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.records import GatingTable

pytestmark = NEEDS_DEVICE
N_PROMPT, N_STEPS = (4, 4) if IS_INTERPRETED else (12, 40)
BOUND = rounding_bound(torch.bfloat16)


@pytest.fixture(autouse=True)
def captured(tmp_path, monkeypatch):
    """Count captures, and keep what is compiled apart."""
    monkeypatch.setenv("ADAPMOE_LAB_CACHE", str(tmp_path / "cache"))
    with counting_steps() as steps:
        yield steps


def decoded(model, ids, position):
    """Return the logits [N, V] of every step of a new sequence, and the counters [2, L] of them."""
    position.zero_()
    decoder = model.decoder()
    decoder.prefill(ids[:N_PROMPT])
    before = model.engine.traffic
    found = step_through(decoder, ids, position, N_PROMPT)
    counted = model.engine.traffic - before
    return found, np.stack([counted.hits, counted.misses])


def under_gatings(model, captured):
    """Return logits and counters of a text under several gatings, captured once."""
    spec, ids = model.spec, drawn_tokens(N_PROMPT + N_STEPS)
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    choices = random_choices(spec.n_layers, len(ids), spec.n_experts, spec.top_k, DEVICE)
    before, found = len(captured), []
    with forced_routing(model, choices, position):
        for gating in (None, *(GatingTable(np.full((3, 1), cut)) for cut in (0.62, 0.8))):
            model.apply(replace(model.config, plan=slots_plan(spec, 3), gating=gating))
            found.append(decoded(model, ids, position))
    assert len(captured) == before + 1, "cuts are no part of what is compiled"
    return found


def test_compiled_steps_do_what_uncompiled_ones_do(tmp_path, captured):
    folder = save_tiny("mixtral", tmp_path)
    expected = under_gatings(load_graph(folder), captured)
    model = load_graph(folder, compile_steps=True)
    found, codes = run_and_get_code(lambda: under_gatings(model, captured))
    for number, (plain, compiled) in enumerate(zip(expected, found, strict=True)):
        (wanted, wanted_counters), (logits, counters) = plain, compiled
        errors = (logits - wanted).norm(dim=1) / wanted.norm(dim=1)
        is_gated = number > 0  # weights rounded otherwise may lie on the other side of a cut
        assert np.abs(counters - wanted_counters).sum() <= (3 if is_gated else 0)
        assert float(errors.median() if is_gated else errors.max()) < BOUND
    calls = re.findall(r"adapmoe_lab\.decide\.default\((.*)\)", "\n".join(codes))
    assert len(calls) == model.spec.n_layers
    for arguments in calls:
        of_state = arguments.split(", None, ")[1].split(", ")[:12]
        message = f"no copy is made of what a kernel changes, but it is given {arguments}"
        assert all(re.fullmatch(r"arg\d+_1", name) for name in of_state), message


def test_a_step_that_cannot_be_compiled_is_captured_as_it_is(tmp_path, monkeypatch, captured):
    def failing(hf):
        def forward(**_):
            raise (CaptureError if IS_INTERPRETED else RuntimeError)("no such instruction")

        return forward

    monkeypatch.setattr(captured_step, "compiled", failing)
    model = load_graph(save_tiny("mixtral", tmp_path), compile_steps=True)
    decoder = model.decoder()
    decoder.prefill(drawn_tokens(N_PROMPT))
    with pytest.warns(CompileWarning, match="are not compiled: .*no such instruction"):
        decoder.step(1)
    assert model.engine.runs_steps_by == "graph"
    decoder.step(2)


def test_another_hook_is_seen_by_the_next_sequence(tmp_path, captured):
    model = load_graph(save_tiny("mixtral", tmp_path))

    def logits():
        decoder = model.decoder()
        decoder.prefill(drawn_tokens(N_PROMPT))
        return decoder.step(1).float().clone()

    plain = logits()
    goes_on = model.decoder()
    goes_on.prefill(drawn_tokens(N_PROMPT))
    handle = model.hf.lm_head.register_forward_hook(lambda _, __, output: -output)
    goes_on.prefill(drawn_tokens(2))
    goes_on.step(1)
    assert len(captured) == 2, "the next turn of a sequence sees it, too"
    assert torch.equal(logits(), -plain)
    handle.remove()
    assert torch.equal(logits(), plain)
    assert torch.equal(logits(), plain)
    assert len(captured) == 3


def test_a_text_under_inference_mode_leaves_nothing_that_others_cannot_use(tmp_path):
    model, ids = load_graph(save_tiny("mixtral", tmp_path)), drawn_tokens(N_PROMPT)
    sampling = Sampling(0.9, top_k=5, seed=2)

    def text():
        return list(generate_tokens(model.decoder(), ids, 5, sampling))

    with torch.inference_mode():
        first = text()
    assert text() == first
    with torch.inference_mode():
        assert text() == first


def test_a_text_goes_on_where_the_captured_choice_was_given_up():
    logits, sampling = torch.randn((12, 50)), Sampling(1.5, seed=4, repetition_penalty=1.5)
    prompt = torch.tensor([3, 4])

    class Captured(Sampler):
        def __init__(self):
            super().__init__(sampling, prompt)

        def begin(self, sampling, text):
            super().__init__(sampling, text)

        def next_token(self, logits, _):
            return self.choose(logits)

    at = iter([None] * 3 + [Captured()] * 5 + [None] * 4)
    replayed, plain = ReplayedSampler(lambda: next(at), sampling, prompt), Sampler(sampling, prompt)
    assert [replayed.choose(row) for row in logits] == [plain.choose(row) for row in logits]


def test_tokens_are_chosen_on_the_device_as_by_the_host(tmp_path):
    model = load_graph(save_tiny("mixtral", tmp_path))
    samplings = [
        Sampling(),
        Sampling(repetition_penalty=1.7),
        Sampling(1.5, seed=3),
        Sampling(0.7, seed=2**64 - 5, repetition_penalty=1.3),
        Sampling(2.0, top_k=9, seed=1),
        Sampling(2.0, top_k=30, top_p=0.8, seed=1, repetition_penalty=1.1),
    ]
    prompt = drawn_tokens(N_PROMPT)
    with counting_captures("captured_choice") as choices:
        for number, sampling in enumerate(samplings):
            decoder, by_host = model.decoder(), Sampler(sampling, prompt)
            logits = decoder.prefill(prompt)
            sampler = decoder.sampler(sampling, prompt)
            for _ in range(N_STEPS):
                kept = logits.clone()
                token = sampler.choose(logits)
                assert token == by_host.choose(kept), f"sampling {number}"
                logits = decoder.step(token)
    assert len(choices) == 3, "one of a kind: what else differs is data"
