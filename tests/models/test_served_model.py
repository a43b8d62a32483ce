"""A model whose experts are served looks whole and is not: it says so, and is once detached."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import save_model
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from adapmoe_lab.engine.loading import load

IDS = torch.arange(1, 40)[None]

WAYS = {
    "state_dict": lambda hf, folder: hf.state_dict(),
    "state_dict of its base": lambda hf, folder: hf.base_model.state_dict(),
    "save_pretrained": lambda hf, folder: hf.save_pretrained(folder),
    "save_pretrained as it is": lambda hf, folder: hf.save_pretrained(
        folder, save_original_format=False
    ),
    "save_pretrained in shards": lambda hf, folder: hf.save_pretrained(
        folder, max_shard_size="50KB"
    ),
    "save_model": lambda hf, folder: save_model(hf, folder / "model.safetensors"),
    "deepcopy": lambda hf, folder: copy.deepcopy(hf),
    "deepcopy of its base": lambda hf, folder: copy.deepcopy(hf.base_model),
    "pickle": lambda hf, folder: pickle.dumps(hf),
    "torch.save": lambda hf, folder: torch.save(hf, io.BytesIO()),
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_tiny("qwen3_moe", tmp_path_factory.mktemp("qwen"))


def loaded(folder, **arguments):
    return load(folder, device="cpu", link="none", announce=lambda _: None, **arguments)


@pytest.fixture(scope="module")
def served(qwen):
    return loaded(qwen)


@pytest.mark.parametrize("way", WAYS)
def test_it_is_never_had_without_its_experts(served, tmp_path, way):
    with pytest.raises(RuntimeError, match=r"served from outside.*Call model\.detach\(\) first"):
        WAYS[way](served.hf, tmp_path)
    assert not list(tmp_path.glob("*.safetensors*")), "weights were written"


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_the_handle_is_refused_like_its_model(served, tmp_path, way):
    with pytest.raises(RuntimeError, match=r"Call model\.detach\(\) first"):
        WAYS[way](served, tmp_path)


def test_nothing_of_it_is_uploaded(served, monkeypatch):
    repository = type("Repository", (), {"repo_id": "someone/model"})
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: repository)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: None)
    uploaded = []
    monkeypatch.setattr(
        type(served.hf), "_upload_modified_files", lambda *given, **_: uploaded.append(given)
    )
    with pytest.raises(RuntimeError, match=r"Call model\.detach\(\) first"):
        served.hf.push_to_hub("someone/model")
    assert not uploaded


def test_weights_outside_the_experts_can_be_had(served, qwen):
    plain = dict(AutoModelForCausalLM.from_pretrained(qwen).named_parameters())
    found = {name: tensor for name, tensor in served.hf.named_parameters() if tensor.numel()}
    assert set(plain) - set(found) == {name for name in plain if ".experts." in name}
    assert all(torch.equal(tensor, plain[name]) for name, tensor in found.items())


@torch.no_grad()
def test_once_detached_it_is_whole(qwen, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(qwen)
    right, weights = plain(IDS).logits, plain.state_dict()
    hf = loaded(qwen).detach()
    assert hf.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in hf.state_dict().items())
    for name, original in (("original", True), ("fused", False)):
        hf.save_pretrained(tmp_path / name, save_original_format=original)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(saved(IDS).logits, right)
    for again in (copy.deepcopy(hf), pickle.loads(pickle.dumps(hf))):  # noqa: S301 made here
        assert torch.equal(again(IDS).logits, right)


def test_moved_away_from_its_experts_it_says_where_they_are(qwen):
    model = loaded(qwen)
    model.hf.to("meta")
    expected = r"moved to meta, its experts are served on cpu\. Move it back, load it with device="
    with pytest.raises(RuntimeError, match=expected):
        model.hf(IDS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_cast_it_runs_as_the_plain_model_cast(qwen, dtype):
    plain = AutoModelForCausalLM.from_pretrained(qwen).to(dtype)
    plain.set_experts_implementation("eager")  # the only one that takes float64
    model = loaded(qwen)
    model.hf.to(dtype)
    right, found = plain(IDS).logits, model.hf(IDS).logits
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps * float(right.abs().max())
    torch.testing.assert_close(found, right, rtol=0, atol=8 * rounding)
    detached = model.detach()
    assert {tensor.dtype for tensor in detached.parameters()} == {dtype}
