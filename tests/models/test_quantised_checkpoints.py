"""Checkpoints that come quantised: the same numbers as their dequantised weights give."""

import json
import shutil

import numpy as np
import pytest
import torch
from quantised_checkpoints import (
    read_tensors,
    save_fp8_deepseek,
    save_mxfp4_gpt_oss,
    write_tensors,
)
from tiny_models import VOCABULARY_SIZE, save_tiny
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from adapmoe_lab.engine.loading import load
from adapmoe_lab.models.checkpoint.configuration import ConfigDisagreementWarning
from adapmoe_lab.models.checkpoint.number_formats import dequantise_fp8
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError

IDS = torch.randint(1, VOCABULARY_SIZE, (2, 20), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


@pytest.mark.parametrize("shape", [(4, 4), (5, 7), (256, 130), (300, 576)])
@pytest.mark.parametrize("block", [128, 32, 4])
def test_fp8_blocks_are_read_as_a_plain_loop_reads_them(shape, block):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * 100).to(torch.float8_e4m3fn)
    n_blocks = [-(-size // block) for size in shape]
    scales = torch.rand(n_blocks, generator=generator)
    expected = weight.float()
    for row, column in np.ndindex(*n_blocks):
        at = np.s_[row * block : (row + 1) * block, column * block : (column + 1) * block]
        expected[at] *= scales[row, column]
    assert torch.equal(dequantise_fp8(weight, scales), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_fp8_scale_counts_for_the_whole_matrix(shape):
    weight = torch.tensor([[1.0, -2.0], [0.5, 448.0]]).to(torch.float8_e4m3fn)
    found = dequantise_fp8(weight, torch.full(shape, 0.25))
    assert torch.equal(found, weight.float() * 0.25)


def test_fp8_scales_may_be_of_rows_and_of_blocks_that_are_no_power_of_two():
    weight = torch.ones(6, 192).to(torch.float8_e4m3fn)
    rows = torch.arange(1.0, 7)[:, None]
    assert torch.equal(dequantise_fp8(weight, rows), rows.expand(6, 192))
    blocks = torch.tensor([[1.0, 2.0]])
    found = dequantise_fp8(weight, blocks, blocks=(6, 96))
    assert torch.equal(found[0], torch.tensor([1.0] * 96 + [2.0] * 96))


def test_fp8_scales_that_fit_no_blocks_are_refused():
    weight = torch.ones(4, 8).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="7 scales do not divide 8 channels"):
        dequantise_fp8(weight, torch.ones(4, 7))
    with pytest.raises(ValueError, match=r"scales \[4\] do not fit a matrix \[4, 8\]"):
        dequantise_fp8(weight, torch.ones(4))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(), (1,)])
def test_fp8_with_one_scale_per_matrix_is_read_as_transformers_reads_it(tmp_path, shape):
    folder = save_tiny("qwen3_moe", tmp_path)
    tensors = read_tensors(folder)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(shape)
    write_tensors(folder, tensors)
    path = folder / "config.json"
    settings = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    model = load(folder, dtype="float32", device="cpu", link="none")
    torch.testing.assert_close(model.hf(IDS).logits, plain(IDS).logits, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(), (1,), (8,), (8, 1, 1)])
def test_fused_fp8_experts_have_a_scale_each_or_one_for_all(tmp_path, shape):
    folder = save_tiny("gpt_oss", tmp_path / "plain")
    tensors = read_tensors(folder)
    packed = shutil.copytree(folder, tmp_path / "packed")
    quantised = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        codes = (tensors[name] * 40).to(torch.float8_e4m3fn)
        scales = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.01
        each = scales.expand(1) if scales.numel() == 1 else scales
        tensors[name] = codes.float() * each.reshape(-1, 1, 1)
        quantised[name], quantised[f"{name}_scale_inv"] = codes, scales
    write_tensors(folder, tensors)
    write_tensors(packed, quantised)
    with pytest.warns(ConfigDisagreementWarning):
        model = load(packed, dtype="float32", device="cpu", link="none")
    torch.testing.assert_close(model.hf(IDS).logits, logits(folder), rtol=0, atol=2e-5)


def test_scales_that_fit_no_expert_are_refused(tmp_path):
    folder = save_tiny("gpt_oss", tmp_path)
    tensors = read_tensors(folder)
    name = next(name for name in tensors if name.endswith("down_proj"))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(3)
    write_tensors(folder, tensors)
    with (
        pytest.warns(ConfigDisagreementWarning),
        pytest.raises(CheckpointError, match=r"has the shape \(3,\); expected one number, or"),
    ):
        load(folder)


@torch.no_grad()
def test_fp8_blocks_are_dequantised(tmp_path):
    packed, plain = save_fp8_deepseek(tmp_path)
    model = load(packed, dtype="float32", device="cpu", link="none", expert_memory="60%")
    assert model.spec.dtype == "float32"
    torch.testing.assert_close(model.hf(IDS).logits, logits(plain), rtol=0, atol=2e-5)


def test_what_is_not_fp8_is_read_as_plain_checkpoints_are(tmp_path):
    """Router biases that transformers keeps in float32, and the settings of generation."""
    packed, plain = save_fp8_deepseek(tmp_path)
    for folder in (packed, plain):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    loaded = [load(f, dtype="bfloat16", device="cpu", link="none").hf for f in (packed, plain)]
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    biases = [dict(hf.named_buffers())[name] for hf in loaded]
    assert biases[0].dtype == biases[1].dtype
    assert torch.equal(*biases)
    assert loaded[0].generation_config.eos_token_id == [5, 7]


@torch.no_grad()
def test_mxfp4_experts_stay_packed(tmp_path):
    packed, plain = save_mxfp4_gpt_oss(tmp_path)
    model = load(packed, dtype="float32", device="cpu", link="none", expert_memory="60%")
    assert model.spec.dtype == "mxfp4"
    torch.testing.assert_close(model.hf(IDS).logits, logits(plain), rtol=0, atol=2e-5)
    whole = load(plain, dtype="float32", device="cpu", link="none").spec
    assert model.spec.stored_expert_bytes < 0.25 * whole.stored_expert_bytes


@torch.no_grad()
def test_mxfp4_experts_can_be_stored_otherwise(tmp_path):
    packed, plain = save_mxfp4_gpt_oss(tmp_path)
    model = load(packed, dtype="float32", expert_dtype="float32", device="cpu", link="none")
    torch.testing.assert_close(model.hf(IDS).logits, logits(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_other_quantisations_are_refused_by_name(tmp_path, method):
    folder = save_tiny("mixtral", tmp_path)
    path = folder / "config.json"
    settings = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    expected = f"(?s)quantised with {method}.*original checkpoint.*expert_dtype='int4'"
    with pytest.raises(ValueError, match=expected):
        load(folder)


def test_gguf_is_refused_by_name(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"(?s)GGUF file, which is not read.*safetensors"):
        load(tmp_path / "model.gguf")
