"""Every family on the experts interface: exactly as the unmodified model, or said not to be."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from tiny_models import RECIPES, save_tiny
from transformers import AutoModelForCausalLM
from transformers.integrations import moe

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.observing import observing
from adapmoe_lab.models.families import router_scores
from adapmoe_lab.models.support import (
    REFUSED,
    VERIFIED,
    Trait,
    UnsupportedModelError,
    causal_families,
    family_class,
    find_family,
)
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.records.hook_points import HookPoint

NAMED = (
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3",
    "glm4_moe", "ernie4_5_moe", "phimoe", "gpt_oss", "granitemoe", "granitemoeshared", "jamba",
)  # fmt: skip
"""The families that were promised first."""

SELECTION_BIASES = r"score_correction_bias|expert_bias|balancing_biases"


@pytest.fixture(autouse=True)
def one_thread():
    """Keep the tiny products from being spread over threads, which takes far longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def token_ids(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, tiny_models.VOCABULARY_SIZE, shape, generator=generator)


def continuation(hf: torch.nn.Module, ids: torch.Tensor) -> list[int]:
    """Return 24 tokens that transformers' own greedy generation adds to ids [T]."""
    every = hf.generate(
        ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=24,
        do_sample=False, eos_token_id=None,
    )  # fmt: skip
    return every[0, len(ids) :].tolist()


def load_with_two_slots(folder: Path) -> LabModel:
    model = load(folder, dtype="float32", link="none", device="cpu")
    model.apply(replace(model.config, plan=slots_plan(model.spec, 2)))
    return model


def plain_state(hf: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in hf.state_dict().items()}


def skip_if_not_offered(model_type: str) -> None:
    if model_type not in causal_families():
        assert model_type not in NAMED
        pytest.skip(f"transformers {transformers.__version__} does not offer its experts")


@pytest.mark.parametrize("model_type", RECIPES)
@torch.no_grad()
def test_a_family_equals_the_unmodified_model(model_type, tmp_path):
    skip_if_not_offered(model_type)
    folder = save_tiny(model_type, tmp_path)
    ids = token_ids(3, 20)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected_logits, expected_tokens = plain(ids).logits, continuation(plain, ids[0])
    state = plain_state(plain)

    model = load_with_two_slots(folder)
    torch.testing.assert_close(model.hf(ids).logits, expected_logits, rtol=0, atol=1e-5)
    assert continuation(model.hf, ids[0]) == expected_tokens
    assert len(set(expected_tokens)) > 2, "a text of one token proves nothing"
    assert model.engine.traffic.misses.sum() > 2 * model.spec.n_layers, "no expert was replaced"
    assert_traits_tell_the_truth(model_type, model)
    assert_scores_equal_the_routers(model_type, model, ids)

    restored = model.detach().state_dict()
    assert restored.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(restored[name], tensor), name


def assert_traits_tell_the_truth(model_type: str, model: LabModel) -> None:
    layer = model.layers[-1]
    block = model.hf.get_submodule(layer.path.rpartition(".")[0])
    scorer = scoring_module(block)
    source = inspect.getsource(type(scorer).forward)
    experts, names = layer.experts, list(dict(model.hf.named_modules()))
    tensors = [name for name, _ in [*block.named_parameters(), *block.named_buffers()]]
    expected = {
        Trait.UNNORMALISED: not model.spec.normalises_router,
        Trait.SELECTION_BIAS: any(re.search(SELECTION_BIASES, name) for name in tensors),
        Trait.GROUPED: getattr(scorer, "num_group", None) is not None,
        Trait.UNSORTED: "sorted=False" in source,
        Trait.HASHED: any(name.endswith("tid2eid") for name, _ in model.hf.named_buffers()),
        Trait.BIASES: experts.has_bias,
        Trait.INTERLEAVED: not getattr(experts, "is_concatenated", True),
        Trait.TRANSPOSED: experts.is_transposed,
        Trait.UNGATED: not experts.has_gate,
        Trait.OWN_GATE: type(experts)._apply_gate is not moe._default_apply_gate,
        Trait.SHARED: any(re.search(r"\.shared_(expert|mlp)", name) for name in names),
        Trait.LOOPED: max(runs_of_layers(model)) > 1,
        Trait.DENSE_LAYERS: model.spec.n_layers
        < model.hf.config.get_text_config().num_hidden_layers,
    }
    declared = find_family(model_type).traits
    wrong = [trait.name for trait, holds in expected.items() if holds != (trait in declared)]
    assert not wrong, f"declared otherwise than the model is: {wrong}"


def runs_of_layers(model: LabModel) -> list[int]:
    """Return how often each layer's experts are called in a forward pass."""
    passes = []
    with observing(model, {HookPoint.EXPERTS_OUTPUT: passes.append}):
        model.hf(token_ids(1, 3))
    called = Counter(seen.layer for seen in passes)
    assert called == {number: layer.n_runs for number, layer in enumerate(model.layers)}
    return list(called.values())


def assert_scores_equal_the_routers(model_type: str, model: LabModel, ids: torch.Tensor) -> None:
    """A token's chosen experts must have scores in the proportion of the router's weights."""
    passes = []
    with observing(model, {HookPoint.EXPERTS_OUTPUT: passes.append}):
        model.hf(ids)
    for seen in passes:
        layer = model.layers[seen.layer]
        if Trait.OWN_INPUT in find_family(model_type).traits:
            with pytest.raises(UnsupportedModelError, match="can be served, but not profiled"):
                router_scores(layer.router, seen.hidden)
            continue
        scores = router_scores(layer.router, seen.hidden)
        assert scores.shape == (ids.numel(), layer.n_experts)
        chosen = scores.gather(1, torch.from_numpy(seen.indices))
        weights = torch.from_numpy(seen.weights)
        if model_type == "phimoe":
            assert torch.equal(scores.topk(2).indices, torch.from_numpy(seen.indices))
            continue
        torch.testing.assert_close(shares(chosen), shares(weights), rtol=1e-4, atol=1e-5)


def shares(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(dim=1, keepdim=True)


def scoring_module(block: torch.nn.Module) -> torch.nn.Module:
    return getattr(block, "gate", None) or block.router


def test_every_family_on_the_interface_is_in_one_class():
    families = causal_families()
    assert len(families) > 40
    classes = {name: family_class(name) for name in families}
    assert {name for name, c in classes.items() if c == "exact"} == VERIFIED.keys() & families
    assert {name for name, c in classes.items() if c == "refused"} == REFUSED.keys() & families
    assert not VERIFIED.keys() & REFUSED.keys()


def test_exact_is_what_is_compared_here():
    assert VERIFIED.keys() == RECIPES.keys()
    assert set(NAMED) <= VERIFIED.keys()
