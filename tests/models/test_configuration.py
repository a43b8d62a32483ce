"""A configuration is read without running code, and held against what the files hold."""

from __future__ import annotations

import json

import pytest
import torch
from quantised_checkpoints import (
    read_tensors,
    save_fp8_deepseek,
    save_mxfp4_gpt_oss,
    write_tensors,
)
from safetensors.torch import save_file
from tiny_models import VOCABULARY_SIZE, save_tiny
from transformers import AutoModelForCausalLM

from adapmoe_lab.engine.loading import load
from adapmoe_lab.models.checkpoint.checkpoint import look_at_model
from adapmoe_lab.models.checkpoint.configuration import ConfigDisagreementWarning
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.models.checkpoint.skeleton import UnusedTensorsWarning
from adapmoe_lab.models.support import UnsupportedModelError

IDS = torch.randint(1, VOCABULARY_SIZE, (2, 20), generator=torch.Generator().manual_seed(3))


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@torch.no_grad()
def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


def assert_close(found, expected):
    """The sums of a product may be ordered otherwise for other numbers of tokens, by processor."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def served_logits(folder):
    return load(folder, dtype="float32", device="cpu", link="none").hf(IDS).logits


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "swiglu_typo"},
        {"pad_token_id": 999999},
        {"num_hidden_layers": "2"},
        {"rope_scaling": {"type": "nonsense", "factor": 2.0}},
        {"quantization_config": "int4"},
        {"quantization_config": {"bits": 4}},
        {"attn_implementation": "flash_attention_2"},
        {"num_attention_heads": 0},
        {"hidden_size": None},
    ],
)
@pytest.mark.parametrize("look", [load, look_at_model])
def test_a_field_that_fits_no_model_is_told_with_the_file(tmp_path, fields, look):
    folder = save_tiny("qwen3_moe", tmp_path)
    change(folder, **fields)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        look(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "3", "{", ""])
def test_a_file_that_is_no_configuration_is_told(tmp_path, content):
    folder = save_tiny("qwen3_moe", tmp_path)
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be understood .* Correct it"):
        load(folder)


def test_a_model_with_code_of_its_own_is_refused(tmp_path):
    folder = save_tiny("qwen3_moe", tmp_path)
    mark = tmp_path / "was_run"
    (folder / "configuration_own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    change(folder, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    with pytest.raises(UnsupportedModelError, match="code of its own, which is never run"):
        load(folder)
    assert not mark.exists()


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_plain_weights_are_read_as_they_are_whatever_the_configuration_says(tmp_path, method):
    folder = save_tiny("qwen3_moe", tmp_path)
    expected = logits(folder)
    change(folder, quantization_config={"quant_method": method})
    said = f"quantised with {method}, their files that they are plain"
    with pytest.warns(ConfigDisagreementWarning, match=said):
        model = load(folder, dtype="float32", device="cpu", link="none")
    assert model.spec.dtype == "float32"
    with torch.no_grad():
        assert_close(model.hf(IDS).logits, expected)


@pytest.mark.parametrize("save", [save_fp8_deepseek, save_mxfp4_gpt_oss])
def test_quantised_weights_are_dequantised_though_the_configuration_is_silent(tmp_path, save):
    packed, plain = save(tmp_path)
    change(packed, quantization_config=None)
    with pytest.warns(ConfigDisagreementWarning, match="says that the weights are plain"):
        found = served_logits(packed)
    torch.testing.assert_close(found, logits(plain), rtol=0, atol=2e-5)


def test_a_dtype_that_is_not_that_of_the_files_is_told(tmp_path):
    folder = save_tiny("qwen3_moe", tmp_path)
    change(folder, dtype="bfloat16")
    said = r"says dtype 'bfloat16', most weights are stored as float32.* Give dtype='float32'"
    with pytest.warns(ConfigDisagreementWarning, match=said):
        model = load(folder, device="cpu", link="none")
    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert model.hf.dtype == reference.dtype == torch.bfloat16


@pytest.mark.parametrize("where", ["top", "text_config"])
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "modelopt"])
def test_a_quantisation_that_cannot_be_read_is_refused_wherever_it_is_named(
    tmp_path, where, method
):
    folder = save_tiny("qwen3_5_moe", tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    quantisation = {"quant_method": method, "bits": 4, "config_groups": {}, "format": "x"}
    inner = settings if where == "top" else settings["text_config"]
    inner["quantization_config"] = quantisation
    (folder / "config.json").write_text(json.dumps(settings))
    for look in (load, look_at_model):
        with pytest.raises(ValueError, match=f"quantised with {method}"):
            look(folder)


def test_experts_of_whole_numbers_are_refused(tmp_path):
    folder = save_tiny("mixtral", tmp_path)
    tensors = read_tensors(folder)
    name = next(name for name in tensors if ".experts." in name)
    tensors[name] = (tensors[name] * 100).to(torch.int8)
    write_tensors(folder, tensors)
    with pytest.raises(CheckpointError, match=r"is stored as I8.* Give the original checkpoint"):
        load(folder)


def test_float8_without_scales_is_refused(tmp_path):
    folder = save_tiny("mixtral", tmp_path)
    tensors = read_tensors(folder)
    name = next(name for name in tensors if ".experts." in name)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    write_tensors(folder, tensors)
    with (
        pytest.warns(ConfigDisagreementWarning, match="says that the weights are plain"),
        pytest.raises(CheckpointError, match=r"stored as float8, and there is no .*_scale_inv"),
    ):
        load(folder)


@pytest.mark.parametrize("top_k", [[2, 2, 2], 2])
def test_a_number_may_be_given_layer_by_layer(tmp_path, top_k):
    folder = save_tiny("hunyuan_v1_moe", tmp_path)
    change(folder, moe_topk=top_k, num_shared_expert=[1, 1, 1], moe_intermediate_size=[48] * 3)
    model = load(folder, dtype="float32", device="cpu", link="none")
    assert model.spec.top_k == 2
    with torch.no_grad():
        torch.testing.assert_close(model.hf(IDS).logits, logits(folder), rtol=0, atol=2e-5)


def test_numbers_of_experts_that_differ_by_layer_are_refused(tmp_path):
    folder = save_tiny("hunyuan_v1_moe", tmp_path)
    change(folder, moe_topk=[2, 1, 2])
    with pytest.raises(UnsupportedModelError, match=r"different numbers .*=\[2, 1, 2\]"):
        load(folder)


def test_files_beside_a_single_one_are_not_read(tmp_path):
    """A folder that holds a single file and an index is read as transformers reads it."""
    folder = save_tiny("mixtral", tmp_path / "model")
    expected, tensors = logits(folder), read_tensors(folder)
    write_tensors(folder, tensors)
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(other, folder / "other.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(folder), expected)
    assert_close(served_logits(folder), expected)


def test_the_file_that_a_configuration_names_is_read(tmp_path):
    folder = save_tiny("mixtral", tmp_path / "model")
    expected, tensors = logits(folder), read_tensors(folder)
    write_tensors(folder, tensors)
    (folder / "model.safetensors").rename(folder / "named.safetensors")
    wrong = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(wrong, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder, transformers_weights="named.safetensors")
    assert torch.equal(logits(folder), expected)
    assert_close(served_logits(folder), expected)


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    folder = save_tiny("mixtral", tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds an adapter.* merge it into the model"):
        load(folder)


@pytest.mark.parametrize("name", ["someone/attention", "kernels-community/flash-attn2", "a/b@c:d"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("look", [load, look_at_model])
def test_attention_code_that_a_config_names_is_never_fetched(tmp_path, look, key, name):
    folder = save_tiny("qwen3_moe", tmp_path)
    change(folder, **{key: name})
    with pytest.raises(
        UnsupportedModelError, match=rf"code of the hub .*\({name}\), which is never"
    ):
        look(folder)


def test_attention_code_that_a_part_of_a_config_names_is_never_fetched(tmp_path):
    folder = save_tiny("qwen3_5_moe", tmp_path)
    change(folder, attn_implementation={"text_config": "a/b"})
    with pytest.raises(
        UnsupportedModelError, match=r"code of the hub .*\(a/b\), which is never run"
    ):
        load(folder)


def test_a_config_may_name_attention_of_transformers_itself(tmp_path):
    folder = save_tiny("qwen3_moe", tmp_path)
    change(folder, attn_implementation="eager")
    assert load(folder, device="cpu", link="none").hf.config._attn_implementation == "eager"


def test_tensors_without_a_place_in_the_model_are_told(tmp_path):
    folder = save_tiny("mixtral", tmp_path)
    tensors = read_tensors(folder)
    write_tensors(folder, {**tensors, "model.layers.0.self_attn.q_norm.weight": torch.ones(16)})
    with pytest.warns(UnusedTensorsWarning, match=r"1 tensors that mixtral .*q_norm\.weight"):
        load(folder, device="cpu", link="none")


def test_float8_outside_the_experts_is_not_taken_unscaled(tmp_path):
    folder = save_tiny("mixtral", tmp_path)
    tensors = read_tensors(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    write_tensors(folder, tensors)
    with (
        pytest.warns(ConfigDisagreementWarning),
        pytest.raises(CheckpointError, match=r"q_proj\.weight .* no .*q_proj\.weight_scale_inv"),
    ):
        load(folder)


@pytest.mark.parametrize("content", ["[1]", "{bad"])
def test_settings_of_generation_that_cannot_be_read_are_told_first(tmp_path, content):
    folder = save_tiny("mixtral", tmp_path / "model")
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be understood"):
        load(folder, store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_configuration_with_which_no_token_can_be_run_is_told(tmp_path):
    folder = save_tiny("deepseek_v3", tmp_path)
    change(folder, n_group=None)
    with pytest.raises(CheckpointError, match=r"cannot run the deepseek_v3 model"):
        load(folder)


def test_a_folder_is_looked_at_as_it_is_loaded(tmp_path):
    folder = save_tiny("qwen3_moe", tmp_path)
    change(folder, dtype=None, quantization_config={"quant_method": "mxfp4"})
    with pytest.warns(ConfigDisagreementWarning):
        seen = look_at_model(folder)
    assert (seen.dtype, seen.stored_as) == ("float32", "float32")


@pytest.mark.parametrize("n_experts", [0, -1])
@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("hunyuan_v1_moe", "num_experts"),
        ("mixtral", "num_local_experts"),
        ("deepseek_v3", "n_routed_experts"),
    ],
)
def test_a_model_without_experts_is_refused_in_words(tmp_path, family, field, n_experts):
    folder = save_tiny(family, tmp_path)
    change(folder, **{field: n_experts})
    refused = (CheckpointError, UnsupportedModelError)
    with pytest.raises(refused, match=r"experts|dimension"):
        look_at_model(folder)
    with pytest.raises(refused):
        load(folder, device="cpu", link="none")
