"""What cannot be served is refused by name, and what was never compared says so."""

import warnings

import pytest
import torch
from tiny_models import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from adapmoe_lab.models import support
from adapmoe_lab.models.families import Router, find_moe_layers, router_scores
from adapmoe_lab.models.support import UnsupportedModelError, UnverifiedFamilyWarning, check_family


@pytest.fixture
def mixtral():
    return AutoModelForCausalLM.from_config(tiny_config("mixtral"))


@pytest.mark.parametrize("model_type", ["dbrx", "jetmoe", "llama4", "llama4_text", "longcat_flash"])
def test_families_without_the_interface_are_refused_by_name(model_type):
    expected = f"{model_type} is refused: it does not use .* Supported: .*mixtral.*qwen3_moe"
    with pytest.raises(UnsupportedModelError, match=expected):
        check_family(model_type)


def test_a_dense_family_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"This llama model has no .* Supported: "):
        check_family("llama")


def test_a_family_without_a_causal_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="no causal language model of this type"):
        check_family("qwen3_vl_moe")


def test_a_family_that_this_transformers_does_not_offer_asks_for_a_newer_one(monkeypatch):
    monkeypatch.setattr(support, "_offers_experts", lambda folder: False)
    with pytest.raises(UnsupportedModelError, match=r"aria_text is refused.* install a newer"):
        check_family("aria_text")


def test_a_family_never_compared_warns():
    with pytest.warns(UnverifiedFamilyWarning, match="somebodys_moe .* was never compared"):
        check_family("somebodys_moe")


def test_an_exact_family_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_family("mixtral")


def test_a_model_of_an_exact_family_without_experts_is_refused():
    config = tiny_config("qwen3_moe")
    config.mlp_only_layers = [0, 1, 2]
    with pytest.raises(UnsupportedModelError, match="This qwen3_moe model has no Mixture-of"):
        find_moe_layers(AutoModelForCausalLM.from_config(config))


def test_layers_whose_experts_differ_are_refused(mixtral):
    mixtral.model.layers[1].mlp.experts.down_proj = nn.Parameter(torch.empty(8, 64, 48))
    with pytest.raises(UnsupportedModelError, match=r"experts of 2 kinds .*64, 48"):
        find_moe_layers(mixtral)


def test_a_router_of_another_name_is_found_by_its_rows(mixtral):
    for layer in mixtral.model.layers:
        layer.mlp.chooser = nn.Sequential(layer.mlp.gate)
        del layer.mlp.gate
    routers = [layer.router.module for layer in find_moe_layers(mixtral)]
    assert routers == [layer.mlp.chooser[0] for layer in mixtral.model.layers]


def test_a_block_without_a_router_is_refused(mixtral):
    del mixtral.model.layers[0].mlp.gate
    with pytest.raises(UnsupportedModelError, match=r"a weight of 8 rows, found nothing"):
        find_moe_layers(mixtral)


def test_a_bound_on_logits_bends_the_scores():
    module = nn.Linear(1, 2, bias=False)
    module.weight.data[:] = torch.tensor([[0.0], [30.0]])
    scores = router_scores(Router(module, 2, softcap=3.0), torch.ones(1, 1))
    expected = torch.tensor([[0.0, 3.0]]).softmax(dim=-1)
    torch.testing.assert_close(scores, expected)
