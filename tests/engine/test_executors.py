"""What every executor promises, and what is refused where one cannot."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import PROMPT, decode

from adapmoe_lab.engine.executor import Capabilities
from adapmoe_lab.engine.generation.tokens import generate_tokens
from adapmoe_lab.engine.graph import requirements
from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.observing import observing
from adapmoe_lab.engine.sampling import Sampling
from adapmoe_lab.policies.allocation.slots import shared
from adapmoe_lab.records import GatingTable, PrecisionPlan
from adapmoe_lab.records.hook_points import HookPoint

NARROW = Capabilities(
    "narrow", precisions=("bfloat16",), evictions=("lru",), has_shared_pool=False,
    is_gated=False, has_surrogates=False, has_prefetch=False,
)  # fmt: skip
PLAIN = PrecisionPlan.uniform("bfloat16", (3, 4), 1000)


def test_a_config_is_refused_by_the_name_of_what_cannot_be_run(load_tiny):
    config = load_tiny().config
    gating = GatingTable.per_layer(np.full(3, 0.8), 2)
    with pytest.raises(ValueError, match=r"executor='narrow' does not run gating\. .*'host'"):
        NARROW.check(replace(config, gating=gating), PLAIN)
    with pytest.raises(ValueError, match="does not run eviction 'lfu', experts in int4"):
        NARROW.check(replace(config, eviction="lfu"), PrecisionPlan.uniform("int4", (3, 4), 1000))
    with pytest.raises(ValueError, match="does not run a shared pool of slots"):
        NARROW.check(replace(config, plan=shared(config.plan)), PLAIN)
    NARROW.check(config, PLAIN)
    Capabilities("all").check(replace(config, gating=gating, eviction="lfu"), PLAIN)


def test_an_unknown_executor_and_one_without_its_device_are_refused():
    with pytest.raises(
        ValueError, match=r"executor='fast' .*is unknown; .* 'host', 'graph', 'auto'"
    ):
        load("demo", device="cpu", executor="fast")
    with pytest.raises(ValueError, match=r"needs a CUDA device; this is cpu\. .*executor='host'"):
        load("demo", device="cpu", executor="graph")


def test_compiling_is_refused_where_nothing_is_captured(tiny_checkpoint):
    with pytest.raises(ValueError, match="executor='host' replays none; give executor='graph'"):
        load(tiny_checkpoint, device="cpu", compile_steps=True)
    with pytest.raises(ValueError, match=r"compile_steps must be True or False, got 'yes' \(str\)"):
        load(tiny_checkpoint, device="cpu", executor="auto", compile_steps="yes")
    quiet = {"link": "none", "announce": lambda _: None}
    model = load(tiny_checkpoint, device="cpu", executor="auto", compile_steps=True, **quiet)
    assert model.engine.runs_steps_by == "host"


def test_auto_runs_on_the_host_where_no_graph_can_be_and_says_why(tiny_checkpoint):
    said = []
    model = load(tiny_checkpoint, device="cpu", link="none", executor="auto", announce=said.append)
    why = "steps are driven by the host: executor='graph' needs a CUDA device; this is cpu"
    assert said[-1] == why
    assert repr(model).splitlines()[-1] == why
    assert model.engine.runs_steps_by == "host"
    assert "driven by the host" not in repr(load(tiny_checkpoint, device="cpu", link="none"))


def test_tokens_are_decoded_when_they_are_wanted(load_tiny):
    model = load_tiny()
    ids = model.encode(PROMPT)
    whole = decode(model.hf, ids, 12)
    tokens = generate_tokens(model.decoder(), ids, 12)
    before = model.engine.traffic
    assert next(tokens) == whole[0]
    assert (model.engine.traffic - before).n_steps == 1
    assert [next(tokens), next(tokens)] == whole[1:3]
    assert (model.engine.traffic - before).n_steps == 3
    tokens.close()
    assert list(generate_tokens(model.decoder(), ids, 0)) == []


def test_a_stop_token_ends_the_text_and_is_not_given(load_tiny):
    model = load_tiny()
    ids = model.encode(PROMPT)
    whole = decode(model.hf, ids, 12)
    stop = frozenset({whole[5]})
    found = list(generate_tokens(model.decoder(), ids, 12, stop_ids=stop))
    assert found == whole[: whole.index(whole[5])]


def test_sampling_is_repeatable_and_follows_the_temperature(load_tiny):
    model = load_tiny()

    def sampled(temperature):
        return decode(model.hf, model.encode(PROMPT), 12, sampling=Sampling(temperature, seed=7))

    assert sampled(1.0) == sampled(1.0)
    assert sampled(1e-4) == decode(model.hf, model.encode(PROMPT), 12)


def test_gating_and_prefetcher_can_change_between_steps_with_the_slots_as_they_are(load_tiny):
    model = load_tiny()
    engine = model.engine
    one = GatingTable.per_layer(np.zeros(3), 2)
    tokens = generate_tokens(model.decoder(), model.encode(PROMPT), 4)
    next(tokens)
    before = engine.traffic
    engine.switch_to(one, None)
    next(tokens)
    passed = engine.traffic - before
    assert (passed.kept, passed.skipped) == (3, 3)
    assert engine.gating is one
    engine.switch_to(None, None)
    next(tokens)
    assert (engine.traffic - before).kept == 9


def streamed_and_generated(model, temperature):
    whole = model.generate(PROMPT, 40, temperature, seed=3)
    parts = list(model.stream(PROMPT, 40, temperature, seed=3))
    assert len(parts) > 1
    return model.tokenizer.decode(model.encode(PROMPT)) + "".join(parts), whole


def test_a_streamed_text_is_the_generated_one_in_parts(load_tiny):
    """The tiny model's tokens are bytes: many make no character, some only part of one."""
    streamed, whole = streamed_and_generated(load_tiny(), 1.5)
    assert streamed == whole
    with pytest.raises(ValueError, match="prompt is empty"):
        load_tiny().stream("")


def test_the_demo_streams_word_by_word():
    model = load("demo", device="cpu", link="none", announce=lambda text: None)
    streamed, whole = streamed_and_generated(model, 0.0)
    assert streamed == whole
    assert all("\N{REPLACEMENT CHARACTER}" not in part for part in model.stream(PROMPT, 20))


def test_a_stream_that_is_closed_lets_others_run_the_model(load_tiny):
    model = load_tiny()
    stream = model.stream(PROMPT, 40)
    next(stream)
    stream.close()
    assert model.generate(PROMPT, 4) == model.generate(PROMPT, 4)


def test_a_stream_may_be_read_by_any_thread(load_tiny):
    model = load_tiny()
    stream = model.stream(PROMPT, 12, 1.5)
    first = next(stream)
    with ThreadPoolExecutor(1) as thread:
        rest = thread.submit(lambda: list(stream)).result(timeout=60)
        thread.submit(model.generate, PROMPT, 2).result(timeout=60)
    assert first + "".join(rest) == "".join(model.stream(PROMPT, 12, 1.5))


def test_a_stream_ends_where_another_config_comes_into_force(load_tiny):
    model = load_tiny()
    stream = model.stream(PROMPT, 12, 1.5)
    next(stream)
    with model.running(replace(model.config, gating=GatingTable.per_layer(np.zeros(3), 2))):
        pass
    next(stream)  # the config is what it was
    model.apply(replace(model.config, gating=GatingTable.per_layer(np.zeros(3), 2)))
    with pytest.raises(RuntimeError, match="Another config came into force"):
        next(stream)


def test_a_sequence_whose_pass_was_interrupted_cannot_go_on(load_tiny):
    model = load_tiny()
    decoder = model.decoder()
    decoder.prefill(model.encode(PROMPT))

    def interrupt(layer, _):
        if layer == 1:
            raise KeyboardInterrupt

    with observing(model, {HookPoint.LAYER_OUTPUT: interrupt}), pytest.raises(KeyboardInterrupt):
        decoder.step(1)
    with pytest.raises(RuntimeError, match=r"was interrupted: .* Begin again"):
        decoder.step(1)


def test_a_closed_model_has_no_tokens(load_tiny):
    model = load_tiny()
    decoder = model.decoder()
    decoder.prefill(model.encode(PROMPT))
    stream = model.stream(PROMPT, 4)
    model.close()
    for use in (lambda: decoder.step(1), lambda: next(stream), lambda: model.generate(PROMPT, 2)):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_graph_refuses_to_compute_in_another_precision(monkeypatch):
    monkeypatch.setattr(requirements, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.10.1"))
    with pytest.raises(ValueError, match="computes in bfloat16 or float16, not in float32"):
        requirements.check_computing(torch.device("cuda"), "float32")


def test_graph_refuses_a_triton_that_is_too_old(monkeypatch):
    monkeypatch.setattr(requirements, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.2.0+git1"))
    with pytest.raises(ValueError, match=r"needs triton 3\.3 or newer, .*; this is 3\.2\.0"):
        requirements.check_computing(torch.device("cuda"), "bfloat16")
