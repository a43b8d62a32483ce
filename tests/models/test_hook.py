"""The experts hook: exact while attached, without trace once detached."""

import hashlib

import pytest
import torch
from checkpoints import save_tiny_mixtral
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adapmoe_lab.engine.loading import load
from adapmoe_lab.models.families import UnsupportedModelError, find_moe_layers

IDS = torch.arange(1, 40)[None]


def state_hash(hf):
    sha = hashlib.sha256()
    for name, tensor in sorted(hf.state_dict().items()):
        sha.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@torch.no_grad()
def test_detaching_restores_the_unmodified_model(tiny_checkpoint, load_tiny):
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    before, attributes = state_hash(plain), set(vars(plain.model.layers[0].mlp.experts))
    implementation = plain.config._experts_implementation
    model = load_tiny(expert_memory="60%")
    model.hf(IDS)
    restored = model.detach()
    assert state_hash(restored) == before
    assert set(vars(restored.model.layers[0].mlp.experts)) == attributes
    assert restored.config._experts_implementation == implementation
    torch.testing.assert_close(restored(IDS).logits, plain(IDS).logits, rtol=0, atol=0)


@torch.no_grad()
def test_a_plain_model_is_not_touched_by_one_that_is_served(tiny_checkpoint, load_tiny):
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    expected = plain(IDS).logits
    load_tiny()
    torch.testing.assert_close(plain(IDS).logits, expected, rtol=0, atol=0)


@torch.no_grad()
def test_generate_of_transformers_itself_runs_through_the_engine(tiny_checkpoint, load_tiny):
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    model = load_tiny(expert_memory="60%")
    arguments = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    expected = plain.generate(IDS, **arguments)
    assert torch.equal(model.hf.generate(IDS, **arguments), expected)
    assert model.engine.traffic.misses.sum() > 0


@torch.no_grad()
def test_bfloat16_equals_the_default_experts_bit_for_bit(tiny_checkpoint, load_tiny):
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    plain.set_experts_implementation("grouped_mm")
    model = load_tiny(dtype="bfloat16")
    assert torch.equal(model.hf(IDS).logits, plain(IDS).logits)


def test_a_model_without_experts_is_refused():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="This llama model has no Mixture-of-Experts"):
        find_moe_layers(LlamaForCausalLM(config))


def test_a_missing_folder_and_a_folder_without_a_model_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="No model folder at"):
        load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load(tmp_path)


def test_a_hub_model_that_is_not_cached_says_what_to_give():
    with pytest.raises(FileNotFoundError, match=r"(?s)could not be loaded.*or 'demo'"):
        load("nobody/no-such-model")


def test_top_1_routing_has_nothing_to_skip(tmp_path):
    model = load(save_tiny_mixtral(tmp_path / "top1", top_k=1), link="none", device="cpu")
    assert model.spec.top_k == 1
    assert model.generate("Hello", max_new_tokens=4)
