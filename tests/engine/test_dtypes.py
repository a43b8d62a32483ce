"""Precisions around the engine: autocast, half precision, computing and storing apart."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import save_tiny_mixtral
from drawn_surrogates import compensate, random_surrogates
from runs import decode
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.transfer.clock import VirtualClock
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.profiling.predictors.fit import fit_predictors
from adapmoe_lab.profiling.routing.profile import profile
from adapmoe_lab.profiling.sensitivity.sensitivity import sensitivities
from adapmoe_lab.profiling.surrogates.fit import fit_surrogates
from adapmoe_lab.records import GatingTable, PrefetchSource, PrefetchTable, TunedConfig
from adapmoe_lab.records.step_costs import HostCosts, StepCosts

IDS = torch.arange(1, 40)[None]
ROUNDING = 2**-8
"""What bfloat16 rounds off, of one."""

PREDICTORS = {
    "unfitted": [("next_router", 1), ("own_norm", 1), ("token_embedding", 0)],
    "fitted": [("ridge", 1), ("token_table", 0), ("last_hidden", 0)],
}


def mixed():
    return torch.autocast("cpu", torch.bfloat16)


def loaded(folder, **arguments):
    return load(folder, device="cpu", link="none", announce=lambda _: None, **arguments)


def assert_alike(found, right, n_roundings=8):
    atol = n_roundings * ROUNDING * float(right.abs().max())
    torch.testing.assert_close(found, right, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h"])
@torch.no_grad()
def test_under_autocast_it_is_the_plain_model_under_autocast(tmp_path, family, dtype):
    folder = save_tiny(family, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = loaded(folder, dtype=dtype, expert_memory="60%")
    with mixed():
        assert_alike(model.hf(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("is_mixed", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    ("dtype", "expert_dtype"),
    [
        ("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16"),
        ("float16", "float16"), ("float32", "int4"), ("float16", "int4"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_stored_otherwise_than_computed_it_is_the_plain_model_of_what_is_stored(
    tiny_checkpoint, dtype, expert_dtype, is_mixed
):
    model = loaded(tiny_checkpoint, dtype=dtype, expert_dtype=expert_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        found = model.hf(IDS).logits
        assert_alike(found, model.detach()(IDS).logits)


@pytest.mark.parametrize("way", ["autocast", "cast"])
@torch.no_grad()
def test_what_replaces_skipped_experts_is_that_of_the_formula(tiny_checkpoint, way):
    """But for tokens that are routed otherwise by what was rounded before."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    model = loaded(tiny_checkpoint)
    spec = model.spec
    best_only, surrogates = GatingTable.per_layer([0.0] * 3, 2), random_surrogates(spec)
    model.apply(replace(TunedConfig.untuned(spec), gating=best_only, compensation=surrogates))
    compensate(plain, spec.layer_paths, best_only.cuts, surrogates)
    if way == "cast":
        model.hf.half()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        right, found = plain(IDS).logits, model.hf(IDS).logits.float()
    is_alike = (found - right).abs() < 8 * ROUNDING * right.abs().max()
    assert is_alike.all(dim=-1).float().mean() > 0.9
    assert model.engine.traffic.skipped > 0


@pytest.mark.parametrize("way", ["autocast", "cast"])
@pytest.mark.parametrize("kind", PREDICTORS)
def test_fetching_ahead_changes_no_token(tiny_checkpoint, texts, kind, way):
    model = loaded(tiny_checkpoint, clock=VirtualClock())
    model.engine.step_costs = StepCosts(
        HostCosts(dense_layer_s=2**-8, head_s=2**-9), expert_s=2**-11
    )
    model.link.bytes_per_s = model.spec.stored_expert_bytes / 2**-9
    fitted = fit_predictors(model, texts) if kind == "fitted" else None
    if way == "cast":
        model.hf.half()
    sure = np.full((model.spec.n_layers, model.spec.top_k), 0.95)
    sources = [PrefetchSource(name, distance, sure) for name, distance in PREDICTORS[kind]]
    slots = replace(TunedConfig.untuned(model.spec), plan=slots_plan(model.spec, 1))
    ahead = replace(slots, prefetch=PrefetchTable(sources, 3, fitted))
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        with model.running(slots):
            expected = decode(model.hf, IDS[0], 12)
        with model.running(ahead):
            assert decode(model.hf, IDS[0], 12) == expected
            traffic = model.engine.traffic
    assert (traffic.prefetch_used + traffic.prefetch_wasted).sum() > 0


def gradient(hf, is_mixed):
    embedded = hf.get_input_embeddings()(IDS).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        logits = hf(inputs_embeds=embedded, use_cache=False).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, IDS[0, 1:]).backward()  # within, as some do
    return embedded.grad


@pytest.mark.parametrize("expert_dtype", ["float32", "bfloat16"])
def test_gradients_under_autocast_are_those_of_the_plain_model(tiny_checkpoint, expert_dtype):
    model = loaded(tiny_checkpoint, dtype="float32", expert_dtype=expert_dtype)
    found = gradient(model.hf, is_mixed=True)
    assert_alike(found, gradient(model.detach(), is_mixed=True), n_roundings=16)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_measured_under_autocast_is_what_is_measured_without(tmp_path, texts, dtype):
    """Within what bfloat16 rounds off everywhere else of the model."""
    model = loaded(save_tiny_mixtral(tmp_path), dtype=dtype)

    def measured():
        trace = profile(model, texts, project=tmp_path / "project", reuse=False)
        found = sensitivities(model, texts, ["fisher", "ablation"])
        return trace, found, fit_surrogates(model, texts, rank=2), fit_predictors(model, texts)

    right = measured()
    with mixed():
        found = measured()
    assert np.mean(found[0].expert_indices == right[0].expert_indices) > 0.95
    for name, sensitivity in right[1].items():
        again, atol = found[1][name].cost, 0.1 * sensitivity.cost.max()
        np.testing.assert_allclose(again, sensitivity.cost, atol=atol)
    largest = np.abs(right[2].offset[0]).max()
    np.testing.assert_allclose(found[2].offset[0], right[2].offset[0], atol=0.2 * largest)
    assert np.abs(found[3].ridge[1] - right[3].ridge[1]).max() < 0.5
