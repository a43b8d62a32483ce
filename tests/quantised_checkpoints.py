"""Tiny checkpoints in the quantised forms that large models are published in."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

BLOCK = 16
FP8_WEIGHTS = re.compile(r"(self_attn\..*proj[^.]*|(gate|up|down)_proj)\.weight$")


def save_fp8_deepseek(folder: Path) -> tuple[Path, Path]:
    """Write a DeepSeek-V3 in block-scaled fp8; return it and the same weights in float32."""
    plain = save_tiny("deepseek_v3", folder / "plain")
    packed = folder / "fp8"
    shutil.copytree(plain, packed)
    tensors = read_tensors(plain)
    quantised: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if FP8_WEIGHTS.search(name) is None:
            quantised[name] = tensor
            continue
        codes, scale = _to_fp8(tensor)
        quantised[name], quantised[f"{name}_scale_inv"] = codes, scale
        spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        tensors[name] = codes.float() * spread[: tensor.shape[0], : tensor.shape[1]]
    write_tensors(plain, tensors)
    write_tensors(packed, quantised)
    _add_to_config(
        packed,
        quant_method="fp8",
        weight_block_size=[BLOCK, BLOCK],
        activation_scheme="dynamic",
    )
    return packed, plain


def save_mxfp4_gpt_oss(folder: Path) -> tuple[Path, Path]:
    """Write a gpt-oss with microscaled experts; return it and the same weights in float32."""
    plain = save_tiny("gpt_oss", folder / "plain")
    packed = folder / "mxfp4"
    shutil.copytree(plain, packed)
    tensors, generator = read_tensors(plain), torch.Generator().manual_seed(0)
    quantised = {}
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            quantised[name] = tensor
            continue
        n_experts, n_inputs, n_outputs = tensor.shape
        shape = (n_experts, n_outputs, n_inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 126, shape, dtype=torch.uint8, generator=generator)
        quantised[f"{name}_blocks"], quantised[f"{name}_scales"] = blocks, scales
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    write_tensors(plain, tensors)
    write_tensors(packed, quantised)
    _add_to_config(packed, quant_method="mxfp4", modules_to_not_convert=["self_attn", "router"])
    return packed, plain


def _to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n_rows, n_columns = (-(-size // BLOCK) for size in weight.shape)
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scale = torch.empty(n_rows, n_columns)
    for i in range(n_rows):
        for j in range(n_columns):
            at = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scale[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
    return codes, scale


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint by name."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace a checkpoint's files by a single one."""
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _add_to_config(folder: Path, **quantisation: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": quantisation}))
