"""Precisions around the engine on a real GPU: autocast, and what its kernels do not take."""

import pytest
import torch
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from adapmoe_lab.engine.loading import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

IDS = torch.arange(1, 40)[None]


@pytest.mark.parametrize("mixed", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@torch.no_grad()
def test_under_autocast_it_is_the_plain_model_under_autocast(tmp_path, dtype, mixed):
    folder = save_tiny("qwen3_moe", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).cuda()
    model = load(folder, device="cuda", dtype=dtype, expert_memory="60%")
    with torch.autocast("cuda", mixed):
        right, found = plain(IDS.cuda()).logits.float(), model.hf(IDS.cuda()).logits.float()
    atol = 8 * 2**-8 * float(right.abs().max())
    torch.testing.assert_close(found, right, rtol=0, atol=atol)


@pytest.mark.parametrize("way", ["autocast", "float64"])
@pytest.mark.parametrize("n_tokens", [1, 39])
@torch.no_grad()
def test_packed_experts_are_the_plain_model_of_what_is_stored(tmp_path, n_tokens, way):
    folder = save_tiny("qwen3_moe", tmp_path)
    model = load(folder, device="cuda", dtype="float32", expert_dtype="int4")
    if way == "float64":
        model.hf.double()
    ids = IDS[:, :n_tokens].cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=way == "autocast"):
        found = model.hf(ids).logits
        plain = model.detach()
        plain.set_experts_implementation("eager" if way == "float64" else "grouped_mm")
        right = plain(ids).logits
    atol = 8 * 2**-8 * float(right.abs().max())
    torch.testing.assert_close(found, right, rtol=0, atol=atol)
