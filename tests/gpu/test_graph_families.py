"""Captured steps of every family: nearly the unmodified model's logits, the host's counters.

On a GPU; without one in Triton's interpreter, as `tests/engine/test_graph_interpreted.py` does.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from forced_routing import drawn_tokens, forced_experts, random_choices, step_through
from interpreted_graph import (
    DEVICE,
    IS_INTERPRETED,
    NEEDS_DEVICE,
    counting_steps,
    load_graph,
)
from tiny_models import RECIPES, save_tiny
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from adapmoe_lab.engine.graph.requirements import reason_of
from adapmoe_lab.engine.host_driven.decoder import TransformersDecoder
from adapmoe_lab.models.capturable import CAPTURED, NOT_CAPTURED
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.models.support import causal_families
from adapmoe_lab.policies.allocation.slots import slots_plan

pytestmark = NEEDS_DEVICE
N_PROMPT, N_STEPS = (13, 6) if IS_INTERPRETED else (10, 24)
WINDOW = 16
"""Tokens that a sliding layer sees: fewer than a text has."""

TIMES_ROUNDING, AND_MORE = 2.0, 5e-3
"""Error of logits that is allowed: as often that of the unmodified model in the same precision."""


AMPLIFYING = {"bailing_hybrid", "gemma4", "gemma4_text", "inkling2_loop_text", "qwen3_next"}
"""Families whose tiny models make so much of bfloat16's rounding that a bound by it says little."""


@pytest.fixture(autouse=True)
def captured():
    with counting_steps() as steps:
        yield steps


def offered(families):
    return sorted(families & causal_families().keys())


def saved(family, folder, monkeypatch):
    """Write a tiny checkpoint whose windows a text leaves, and whose indexers see no two alike."""
    text = RECIPES[family].get("text_config", family)
    fields = inspect.signature(CONFIG_MAPPING[text]).parameters
    wanted = {"sliding_window": WINDOW, "sliding_window_size": WINDOW, "index_n_heads": 16}
    others = {name: value for name, value in wanted.items() if name in fields}
    monkeypatch.setitem(RECIPES, text, {**RECIPES[text], **others})
    return save_tiny(family, folder)


def precision_of(family):
    """Return what a family is compared in; bfloat16 would round an indexer's scores alike."""
    text = RECIPES[family].get("text_config", family)
    is_fine = family in AMPLIFYING or "index_n_heads" in RECIPES[text]
    return "float16" if is_fine else "bfloat16"


@torch.no_grad()
def teacher_forced(decoder, ids, position, n_prompt=N_PROMPT):
    """Return the logits [N, V] of what follows the prompt and every token after it."""
    position.zero_()
    first = decoder.prefill(ids[:n_prompt].to(DEVICE)).float().clone()
    return torch.cat([first[None], step_through(decoder, ids, position, n_prompt)])


class Unmodified:
    """The logits of transformers' own model, and how far rounding takes them."""

    def __init__(self, folder, model, choices, ids, position, n_prompt=N_PROMPT):
        def logits(dtype):
            plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(DEVICE)
            plain.set_experts_implementation("eager")  # the one that takes any shape
            experts = [plain.get_submodule(layer.path) for layer in model.layers]
            with forced_experts(experts, choices, position):
                return teacher_forced(TransformersDecoder(plain), ids, position, n_prompt)

        self._exact = logits(torch.float32)
        self._bound = TIMES_ROUNDING * self._error(logits(model.hf.dtype)) + AND_MORE

    def check(self, found):
        error = self._error(found)
        assert error <= self._bound, f"{error:.1e} is more than {self._bound:.1e}"

    def _error(self, found):
        distance = (found - self._exact).norm(dim=1)
        return float((distance / self._exact.norm(dim=1)).max())


def forced(model, n_tokens):
    """Return what a text's tokens choose in every layer, and where the position is written."""
    spec = model.spec
    choices = random_choices(spec.n_layers, n_tokens, spec.n_experts, spec.top_k, DEVICE)
    return choices, torch.zeros(1, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("family", offered(CAPTURED))
def test_a_captured_family_gives_the_unmodified_models_logits(
    family, tmp_path, monkeypatch, captured
):
    folder = saved(family, tmp_path, monkeypatch)
    dtype = precision_of(family)
    model = load_graph(folder, dtype=dtype, expert_dtype=dtype)
    spec, ids = model.spec, drawn_tokens(N_PROMPT + N_STEPS)
    choices, position = forced(model, len(ids))
    unmodified = Unmodified(folder, model, choices, ids, position)
    config, traffic = replace(model.config, plan=slots_plan(spec, spec.top_k + 1)), []

    def decode(decoder):
        before = model.engine.traffic
        unmodified.check(teacher_forced(decoder, ids, position))
        traffic.append(model.engine.traffic - before)

    with forced_experts([layer.experts for layer in model.layers], choices, position):
        model.apply(config)
        decode(TransformersDecoder(model.hf))
        model.apply(config)
        decode(model.decoder())
        decode(model.decoder())  # behind what the sequence before left
    of_host, of_graph, _ = traffic
    assert model.engine.runs_steps_by == "graph"
    assert len(captured) == 1
    assert of_graph.n_steps == of_host.n_steps
    for name in ("hits", "misses"):
        np.testing.assert_array_equal(getattr(of_graph, name), getattr(of_host, name), name)
    assert of_graph.hits.sum() > 0
    assert of_graph.misses.sum() > spec.n_layers * (spec.top_k + 1), "no expert was replaced"


@pytest.mark.parametrize("family", offered(NOT_CAPTURED.keys()))
def test_a_family_that_is_not_captured_runs_by_the_host_and_says_why(
    family, tmp_path, monkeypatch, captured
):
    folder = saved(family, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="executor='graph' cannot serve") as refused:
        load_graph(folder)
    assert NOT_CAPTURED[family] in str(refused.value)
    try:
        model = load_graph(folder, executor="auto")
    except CheckpointError as error:
        if "to have the same dtype" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} runs {family} in float32 only")
    assert model.engine.why_not_replayed == reason_of(refused.value)
    ids = drawn_tokens(N_PROMPT + 2)
    choices, position = forced(model, len(ids))
    unmodified = Unmodified(folder, model, choices, ids, position)
    with forced_experts([layer.experts for layer in model.layers], choices, position):
        unmodified.check(teacher_forced(model.decoder(), ids, position))
    assert model.engine.runs_steps_by == "host"
    assert not captured


def without_prefill(decoder):
    """Let a step run the prompt, a single token."""
    return SimpleNamespace(prefill=lambda ids: decoder.step(int(ids)), step=decoder.step)


def test_a_first_token_makes_the_states_that_a_captured_step_replaces(
    tmp_path, monkeypatch, captured
):
    folder = saved("lfm2_moe", tmp_path, monkeypatch)
    model, ids = load_graph(folder), drawn_tokens(6)
    choices, position = forced(model, len(ids))
    unmodified = Unmodified(folder, model, choices, ids, position, n_prompt=1)
    with forced_experts([layer.experts for layer in model.layers], choices, position):
        for _ in range(2):
            decoder = without_prefill(model.decoder())
            unmodified.check(teacher_forced(decoder, ids, position, n_prompt=1))
    assert len(captured) == 1
    assert model.engine.runs_steps_by == "graph"
