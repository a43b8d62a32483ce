"""Decoding by a captured graph on a real GPU: texts, sequences, and what is observed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreted_graph import load_graph
from runs import PROMPT

from adapmoe_lab.engine.generation.tokens import generate_tokens
from adapmoe_lab.engine.host_driven.decoder import TransformersDecoder
from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.observing import observing
from adapmoe_lab.engine.sampling import Sampling
from adapmoe_lab.records.hook_points import HookPoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_the_demo_continues_a_text_as_the_host_does():
    model = load_graph("demo", expert_memory="50%")
    ids = model.encode(PROMPT)
    by_host = list(generate_tokens(TransformersDecoder(model.hf), ids, 32))
    by_graph = list(generate_tokens(model.decoder(), ids, 32))
    same = sum(a == b for a, b in zip(by_host, by_graph, strict=True))
    assert same >= 16, "bfloat16 may choose another word, but not from the beginning"
    assert model.generate(PROMPT, 32) == model.generate(PROMPT, 32)


def test_a_sampled_text_repeats_and_is_the_hosts_to_begin_with():
    model = load_graph("demo", expert_memory="50%")
    ids, sampling = model.encode(PROMPT), Sampling(0.8, top_k=40, top_p=0.9, seed=5)
    by_host = list(generate_tokens(TransformersDecoder(model.hf), ids, 16, sampling))
    by_graph = list(generate_tokens(model.decoder(), ids, 16, sampling))
    assert by_graph[:4] == by_host[:4]
    assert by_graph == list(generate_tokens(model.decoder(), ids, 16, sampling))


def test_a_conversation_outlives_another_sequence():
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    model = load_graph("demo", expert_memory="50%")
    chat, other = (model.conversation(max_new_tokens=8, chat_template=template) for _ in range(2))
    said = [chat.say("Once upon a time"), other.say("Once upon a time")]
    assert said[0] == said[1]
    assert chat.say("there was") == other.say("there was")
    assert chat.messages == other.messages


def test_a_sequence_goes_on_after_replays_with_several_tokens_more():
    model = load_graph("demo", expert_memory="50%")
    ids = model.encode(PROMPT + " lived in a house by the sea, where he had all that he wanted.")
    decoder = model.decoder()
    decoder.prefill(ids[:6])
    for token in ids[6:10].tolist():
        decoder.step(token)
    found = [decoder.prefill(ids[10:15]).clone(), decoder.step(int(ids[15])).clone()]
    expected = [TransformersDecoder(model.hf).prefill(ids[:n]) for n in (15, 16)]
    for logits, wanted in zip(found, expected, strict=True):
        assert (logits - wanted).norm() < 2e-2 * wanted.norm()


def test_what_is_observed_runs_layer_by_layer_and_the_next_step_goes_on():
    model = load_graph("demo", expert_memory="50%")
    decoder = model.decoder()
    logits = decoder.prefill(model.encode(PROMPT))
    for _ in range(3):
        logits = decoder.step(int(logits.argmax()))
    passes, outputs = [], []
    callbacks = {
        HookPoint.EXPERTS_OUTPUT: passes.append,
        HookPoint.LAYER_OUTPUT: lambda layer, _: outputs.append(layer),
    }
    with observing(model, callbacks):
        logits = decoder.step(int(logits.argmax()))
    assert [seen.layer for seen in passes] == outputs == list(range(model.spec.n_layers))
    before = model.engine.traffic
    decoder.step(int(logits.argmax()))
    passed = model.engine.traffic - before
    assert passed.n_steps == 1
    assert passed.hits.sum() + passed.misses.sum() == model.spec.n_layers * model.spec.top_k


def test_one_sequence_at_a_time_and_no_further_than_its_room():
    model = load_graph("demo", expert_memory="50%")
    first = model.decoder()
    first.prefill(model.encode(PROMPT))
    second = model.decoder()
    second.prefill(torch.arange(128))
    with pytest.raises(RuntimeError, match="Another sequence has begun"):
        first.step(1)
    with pytest.raises(ValueError, match="max_context_tokens=129"):
        second.step(1)


def test_what_it_cannot_run_is_refused_by_name():
    model = load_graph("demo", expert_memory="50%")
    with pytest.raises(ValueError, match="does not run eviction 'lfu'"):
        model.apply(replace(model.config, eviction="lfu"))
    with pytest.raises(ValueError, match=r"experts in bfloat16\. It runs experts in float16"):
        load_graph("demo", dtype="float16", expert_dtype="bfloat16")
    with pytest.raises(ValueError, match="does not run experts in int4"):
        load_graph("demo", expert_dtype="int4")
    with pytest.raises(ValueError, match="does not run eviction 'hobbit'"):
        model.engine.configure(None, model.engine.plan, "hobbit")
    with pytest.raises(ValueError, match="computes in bfloat16 or float16, not in float32"):
        load("demo", device="cuda", dtype="float32", expert_dtype="bfloat16", executor="graph")
    decoder = model.decoder()
    model.close()
    uses = (
        lambda: model.apply(model.config),
        lambda: model.generate(PROMPT, 2),
        lambda: decoder.prefill(torch.arange(4)),
    )
    for use in uses:
        with pytest.raises(RuntimeError, match=r"closed|slots have changed"):
            use()
