"""Prompts whose experts run in groups: as one expert after another, counters and all.

On a GPU; without one in Triton's interpreter, as `tests/engine/test_grouped.py` does.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from drawn_surrogates import random_surrogates
from forced_routing import forced_routing, random_choices
from interpreted import multiplying_bfloat16
from interpreted_graph import DEVICE, IS_INTERPRETED, NEEDS_DEVICE, load_graph
from runs import decode
from tiny_models import SHARED, VOCABULARY_SIZE, save_tiny
from transformers import AutoModelForCausalLM

from adapmoe_lab.engine.host_driven import expert_sources, grouped
from adapmoe_lab.engine.host_driven.grouped import GroupedProducts
from adapmoe_lab.engine.observing import observing
from adapmoe_lab.engine.rounding import rounding_bound
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.records import CachePlan, GatingTable, PrefetchSource, PrefetchTable
from adapmoe_lab.records.hook_points import HookPoint

pytestmark = NEEDS_DEVICE

N_PROMPTS, N_TOKENS = (2, 7) if IS_INTERPRETED else (3, 40)
FAMILIES = ["mixtral", *([] if IS_INTERPRETED else ["olmoe", "qwen2_moe", "qwen3_moe"])]
TOLERANCE = rounding_bound(torch.bfloat16)
"""Of logits, relative."""

LARGE = grouped.Tile(16, 256, 128, 4, 3)
"""In the interpreter, programs take long and rows do not."""

GATING = GatingTable(np.array([[0.6], [0.75], [2.0]]))
COUNTERS = ("hits", "misses", "prefetch_used", "prefetch_wasted")


@pytest.fixture(autouse=True)
def grouped_layers():
    """Count the layers whose experts ran in groups; without a GPU, let them."""
    layers, run = [], GroupedProducts.contributions

    def counted(products, layer_run, *arguments):
        layers.append(layer_run.layer)
        return run(products, layer_run, *arguments)

    with (
        multiplying_bfloat16() if IS_INTERPRETED else nullcontext(),
        patch.object(grouped, "TILES", [LARGE]) if IS_INTERPRETED else nullcontext(),
        patch.object(GroupedProducts, "contributions", counted),
    ):
        yield layers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny("mixtral", tmp_path_factory.mktemp("tiny"))


def load_host(folder, dtype="bfloat16", **arguments):
    """Load a model whose experts run in groups, without a GPU too."""
    with patch.object(grouped, "runs_kernels", lambda _: True) if IS_INTERPRETED else nullcontext():
        return load_graph(folder, dtype=dtype, executor="host", **arguments)


def one_by_one():
    """Let experts run one after another."""
    return patch.object(GroupedProducts, "serves", lambda *_: False)


def prompts(n=N_PROMPTS):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, VOCABULARY_SIZE, (n, N_TOKENS), generator=generator).to(DEVICE)


def given_routing(model):
    """Return where a prompt begins in a table, and what lets routers choose and weigh by it."""
    spec = model.spec
    shape = spec.n_layers, N_PROMPTS * N_TOKENS
    choices = random_choices(*shape, spec.n_experts, spec.top_k, DEVICE)
    weights = torch.rand((*shape, spec.top_k), generator=torch.Generator().manual_seed(1)) + 0.1
    weights = (weights / weights.sum(dim=-1, keepdim=True)).to(DEVICE)
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    return position, lambda served: forced_routing(served, choices, position, weights)


def logits_of(hf, position):
    """Return the logits [N, V] of prompts, one after the other."""
    found = []
    for number, ids in enumerate(prompts()):
        position.fill_(number * N_TOKENS)
        found.append(hf(ids[None], use_cache=False).logits[0].float())
    return torch.cat(found)


@torch.no_grad()
def run(model, config=None):
    """Return the logits of prompts one after the other under given routing, and the counters.

    The slots are empty before, but without a config as they are.
    """
    position, given = given_routing(model)
    if config is not None:
        model.apply(config)
    with given(model):
        return logits_of(model.hf, position), model.engine.traffic


def check(model, config, layers, tolerance=TOLERANCE):
    """Check that groups give nearly the logits, and just the counters, of one by one."""
    with one_by_one():
        expected, counted = run(model, config)
    assert not layers
    found, traffic = run(model, config)
    assert len(layers) == N_PROMPTS * model.spec.n_layers
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < tolerance
    for name in COUNTERS:
        np.testing.assert_array_equal(getattr(traffic, name), getattr(counted, name), name)
    for name in ("n_steps", "kept", "skipped", "bytes_moved"):
        assert getattr(traffic, name) == getattr(counted, name), name
    layers.clear()
    return found, traffic


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_equal_one_by_one_at_every_number_of_slots(tmp_path, family, grouped_layers):
    model = load_host(save_tiny(family, tmp_path))
    found = []
    for slots in (0, 3, 8) if IS_INTERPRETED else range(9):
        config = replace(model.config, plan=slots_plan(model.spec, slots))
        logits, traffic = check(model, config, grouped_layers)
        found.append(logits)
        misses = traffic.misses.sum()
        assert traffic.bytes_moved == misses * model.spec.stored_expert_bytes
    assert all(torch.equal(found[0], other) for other in found), "what is resident changes bits"


@torch.no_grad()
def test_a_prompt_equals_that_of_the_unmodified_model(tiny):
    model = load_host(tiny)
    found, _ = run(model, replace(model.config, plan=slots_plan(model.spec, 3)))
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).to(DEVICE).eval()
    names = {module: name for name, module in model.hf.named_modules()}
    routers = [plain.get_submodule(names[layer.router.module]) for layer in model.layers]
    layers = [SimpleNamespace(router=SimpleNamespace(module=router)) for router in routers]
    position, given = given_routing(model)
    with given(SimpleNamespace(layers=layers)):
        expected = logits_of(plain, position)
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < TOLERANCE


def test_activations_are_bounded_and_their_number_changes_no_bit(tiny, monkeypatch):
    model = load_host(tiny)
    config = replace(model.config, plan=slots_plan(model.spec, 8))
    expected, _ = run(model, config)
    rows, activate = [], grouped.activate

    def counted(module, inner):
        rows.append(len(inner))
        return activate(module, inner)

    monkeypatch.setattr(grouped, "activate", counted)
    row_bytes = 2 * 2 * SHARED["intermediate_size"]
    monkeypatch.setattr(grouped, "MOST_INNER_BYTES", N_TOKENS * row_bytes)
    found, _ = run(model, config)
    assert torch.equal(found, expected)
    assert sum(rows) == N_PROMPTS * N_TOKENS * model.spec.n_layers * model.spec.top_k
    assert max(rows) <= N_TOKENS, "as one expert may have"
    assert len(rows) > N_PROMPTS * model.spec.n_layers


def test_experts_in_float16_run_in_groups_too(tiny, grouped_layers):
    model = load_host(tiny, dtype="float16", expert_dtype="float16")
    check(model, replace(model.config, plan=slots_plan(model.spec, 3)), grouped_layers)


@pytest.mark.parametrize("is_renormalised", [False, True])
def test_what_is_skipped_is_the_same(tiny, grouped_layers, is_renormalised):
    model = load_host(tiny)
    gating = replace(GATING, renormalise=is_renormalised)
    config = replace(model.config, plan=slots_plan(model.spec, 3), gating=gating)
    _, traffic = check(model, config, grouped_layers)
    assert 0 < traffic.skipped < traffic.kept


def test_surrogates_take_the_place_of_what_is_skipped(tiny, grouped_layers):
    model = load_host(tiny)
    surrogates = random_surrogates(model.spec, ranks=[3, 0, 4])
    config = replace(
        model.config, plan=slots_plan(model.spec, 3), gating=GATING, compensation=surrogates
    )
    _, traffic = check(model, config, grouped_layers)
    assert traffic.skipped > 0


@pytest.mark.parametrize("eviction", ["lfu_aged", "router_average"])
@pytest.mark.parametrize("is_global", [False, True], ids=["by layer", "shared"])
def test_any_policy_decides_the_same(tiny, grouped_layers, eviction, is_global):
    model = load_host(tiny)
    plan = CachePlan(np.array([2, 0, 4]), None, None, "given", is_global=is_global)
    check(model, replace(model.config, plan=plan, eviction=eviction), grouped_layers)


@pytest.mark.parametrize("slots", [0, 3])
def test_what_was_prefetched_is_run_where_it_lies(tiny, grouped_layers, slots):
    model = load_host(tiny)
    sure = np.full((model.spec.n_layers, model.spec.top_k), 0.95)
    sources = [PrefetchSource(*who, sure) for who in (("next_router", 1), ("own_norm", 1))]
    table = PrefetchTable(sources, buffer_slots=3)
    if IS_INTERPRETED:
        model.link.emulate("slow", bytes_per_s=4e6)
    plan = slots_plan(model.spec, slots)
    found, traffic = run(model, replace(model.config, plan=plan, prefetch=table))
    expected, _ = run(model, replace(model.config, plan=plan))
    assert len(grouped_layers) == 2 * N_PROMPTS * model.spec.n_layers
    assert torch.equal(found, expected)
    assert traffic.prefetch_used.sum() > 0


def test_a_text_goes_on_in_the_slots_that_a_prompt_left(tiny, grouped_layers):
    model = load_host(tiny)
    model.apply(replace(model.config, plan=slots_plan(model.spec, 3)))
    ids = prompts()[0].cpu()
    texts = [decode(model.hf, ids, 4 if IS_INTERPRETED else 24) for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(grouped_layers) == 2 * model.spec.n_layers, "of prompts alone"
    cache = model.engine.cached_experts.cache
    for layer, expert in np.argwhere(cache.slot_of >= 0).tolist():
        stored = model.store.buffer(layer, expert)
        slot = model.engine.cached_experts.slots[layer][cache.slot_of[layer, expert]]
        assert torch.equal(slot[: stored.numel()].cpu(), stored)


def test_callbacks_are_given_every_contribution(tiny):
    model = load_host(tiny)
    model.apply(replace(model.config, plan=slots_plan(model.spec, 3), gating=GATING))
    seen = []
    with torch.no_grad(), observing(model, {HookPoint.EXPERTS_OUTPUT: seen.append}):
        model.hf(prompts(1))
    assert len(seen) == model.spec.n_layers
    for passed in seen:
        assert not passed.contributions[~torch.from_numpy(passed.keep)].any()
        assert passed.contributions[torch.from_numpy(passed.keep)].any(dim=1).all()


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_broken_transfer_leaves_it_exact(tiny, monkeypatch, at):
    model = load_host(tiny)
    config = replace(model.config, plan=slots_plan(model.spec, 3))
    expected, _ = run(model, config)
    model.apply(config)
    link, left = model.link, at

    def failing(name):
        whole = getattr(link, name)

        def method(*arguments):
            nonlocal left
            left -= 1
            if left == 0:
                raise ConnectionError("the link broke")
            return whole(*arguments)

        return method

    for name in ("copy_all", "wait"):
        monkeypatch.setattr(link, name, failing(name))
    with pytest.raises(ConnectionError), torch.no_grad():
        model.hf(prompts(1))
    monkeypatch.undo()
    assert torch.equal(run(model)[0], expected), "in the slots that it left"


def test_what_it_cannot_run_is_run_one_by_one(tiny, grouped_layers):
    wide = load_host(tiny, dtype="float32")
    packed = load_host(tiny, expert_dtype="int8")
    other = load_host(tiny, expert_dtype="float16")
    plain = load_host(tiny)
    with torch.no_grad():
        for model in (wide, packed, other):
            model.hf(prompts(1))
        with plain.engine.reading_store():
            plain.hf(prompts(1))
        plain.hf(prompts(1)[:, :1])
    assert not grouped_layers


def test_staging_takes_little_beside_the_slots(tiny):
    model = load_host(tiny)
    for slots in (0, 3, 8):
        run(model, replace(model.config, plan=slots_plan(model.spec, slots)))
        cached = model.engine.cached_experts
        more = cached._staging_of_groups().numel() - cached._staging.numel()
        assert more <= sum(pool.numel() for pool in cached.slots) / 16


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_buffer_is_never_overwritten_while_it_is_read(tiny, monkeypatch, most):
    """Few slots and one prompt after another: every copy follows a kernel that reads its target."""
    model = load_host(tiny)
    expected, _ = run(model, replace(model.config, plan=slots_plan(model.spec, 8)))
    monkeypatch.setattr(expert_sources, "MOST_STREAMED", most)
    monkeypatch.setattr(expert_sources, "STAGING_SHARE", 100.0)
    for slots in [1] if IS_INTERPRETED else [1, 2]:
        for _ in range(1 if IS_INTERPRETED else 10):
            found, _ = run(model, replace(model.config, plan=slots_plan(model.spec, slots)))
            assert torch.equal(found, expected)
            n_buffers = len(model.engine.cached_experts._staging_of_groups())
            assert n_buffers == 2 * most, "in groups of that size"
