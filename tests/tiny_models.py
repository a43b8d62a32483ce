"""Tiny random checkpoints of many Mixture-of-Experts families, written by transformers itself."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from checkpoints import byte_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY_SIZE = len(byte_tokenizer())

SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 32,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
    "n_group": 2,
    "topk_group": 1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
"""What every family is made with, as far as its configuration has a field of that name."""

LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}
"""Multi-head latent attention."""

INDEXED = {**LATENT, "index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}
"""Latent attention that looks only at what an indexer picks."""

RELATIVE = {
    "rel_extent": 64,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
}
"""Attention with learned relative positions, its sliding layers sized apart."""

INKLING2 = {**RELATIVE, "unpadded_vocab_size": VOCABULARY_SIZE - 7}
"""The vocabulary is padded to a round size; the last rows stand for no token."""

VISION = {
    "hidden_size": 32, "depth": 1, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
    "num_position_embeddings": 16, "patch_size": 4,
}  # fmt: skip
"""A vision tower, of which a causal language model loads nothing."""

DENSE_FIRST = ["dense", "sparse", "sparse"]
LINEAR_FIRST = ["linear_attention", "full_attention", "linear_attention"]
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": LINEAR_FIRST,
}
"""Gated delta networks beside attention."""

RECIPES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1, "layer_types": ["full_attention"] * 3},
    "aria_text": {"moe_num_shared_experts": 1, "moe_topk": 2},
    "axk1": LATENT,
    "axk2": INDEXED,
    "bailing_hybrid": {**LATENT, "layer_group_size": 2},
    "beam": {"mlp_layer_types": DENSE_FIRST},
    "cohere2_moe": {"logit_scale": 1.0},
    "deepseek_v2": {**LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT,
    "deepseek_v32": INDEXED,
    "deepseek_v4": {
        "num_key_value_heads": 1, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 16,
        "index_n_heads": 2, "index_head_dim": 16, "index_topk": 16, "hc_mult": 2,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    "dots1": {"num_key_value_heads": 4},
    "dots3_note": {
        "text_config": "dots3_note_text",
        "vision_config": {
            "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "patch_size": 4,
            "num_attention_heads": 2, "mlp_layer_types": ["dense", "sparse"],
            "num_local_experts": 4, "moe_intermediate_size": 16,
            "adapter_in_dim": 32, "adapter_out_dim": 64,
        },
        "audio_config": {
            "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32,
            "num_attention_heads": 2, "adapter_input_size": 32, "adapter_out_dim": 64,
            "downsample_hidden_size": 16,
        },
    },
    "dots3_note_text": {
        **INDEXED, "shared_experts_intermediate_size": 32, "sliding_window": 32,
        "layer_types": ["full_attention"] * 3,
    },
    "ernie4_5_moe": {
        "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 2,
    },
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"text_config": "gemma4_text", "vision_config": None, "audio_config": None},
    "gemma4_text": {
        "enable_moe_block": True, "top_k_experts": 2, "vocab_size_per_layer_input": 257,
        "hidden_size_per_layer_input": 16, "sliding_window": 64, "global_head_dim": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": INDEXED,
    "gpt_oss": {"sliding_window": 32},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {
        "shared_intermediate_size": 32, "mamba_n_heads": 8, "mamba_d_state": 8,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "granitemoeshared": {"shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "hy_v3": {},
    "hy_v4": {**INDEXED, "hc_mult": 2},
    "inkling2_loop_text": {
        **INKLING2, "num_hidden_layers": 4, "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 3,
        "loop_gate_rank": 8,
    },
    "inkling2_text": INKLING2,
    "inkling_text": {
        **RELATIVE, "logits_mup_width_multiplier": 1.0, "mlp_layer_types": DENSE_FIRST,
    },
    "jamba": {
        "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 0, "mamba_d_state": 8, "mamba_dt_rank": 8,
    },
    "kimi_linear": {
        **LATENT, "linear_head_dim": 16, "linear_num_heads": 4, "layer_types": LINEAR_FIRST,
    },
    "kolibri1": {},
    "laguna": {},
    "lara_mini": {**DELTA, "sliding_window": 32},
    "lfm2_moe": {
        "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"],
    },
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
    "minimax_m2": {},
    "minimax_m3_vl_text": {
        "dense_intermediate_size": 96, "shared_intermediate_size": 32, "rotary_dim": 8,
        "index_n_heads": 2, "index_head_dim": 16,
    },
    "mixtral": {},
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2,
        "use_mamba_kernels": False, "moe_shared_expert_intermediate_size": 32,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
    },
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe": {"text_config": "qwen3_5_moe_text", "vision_config": VISION},
    "qwen3_5_moe_text": DELTA,
    "qwen3_moe": {"mlp_only_layers": [0], "norm_topk_prob": True},
    "qwen3_next": DELTA,
    "qwen4_exp": {"text_config": "qwen4_exp_text", "vision_config": VISION},
    "qwen4_exp_text": {
        **DELTA, "hc_count": 2, "hc_lowrank": 16,
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
"""What each family is made with besides; a family with an entry is compared with plain models."""


def tiny_config(model_type: str) -> Any:
    """Return a family's configuration at a size that runs in an instant."""
    make, recipe = CONFIG_MAPPING[model_type], RECIPES[model_type]
    if "text_config" in recipe:
        return make(**{**recipe, "text_config": tiny_config(recipe["text_config"]).to_dict()})
    fields = {*inspect.signature(make).parameters, *getattr(make, "attribute_map", {})}
    shared = {name: value for name, value in SHARED.items() if name in fields}
    return make(**{**shared, **recipe})


def save_tiny(model_type: str, folder: Path, seed: int = 0) -> Path:
    """Write a random float32 checkpoint in several shards, with a byte tokenizer."""
    torch.manual_seed(seed)
    is_wrapped = "text_config" in RECIPES[model_type]
    auto = AutoModelForImageTextToText if is_wrapped else AutoModelForCausalLM
    hf = auto.from_config(tiny_config(model_type), dtype=torch.float32)
    spread_weights(hf, torch.Generator().manual_seed(seed))
    hf.save_pretrained(folder, max_shard_size="200KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def spread_weights(hf: nn.Module, generator: torch.Generator) -> None:
    """Draw weights wide enough that tokens differ, routers choose, and no bias is zero."""
    for name, tensor in [*hf.named_parameters(), *hf.named_buffers()]:
        if re.search(r"tid2eid", name):
            draws = torch.rand(*tensor.shape[:-1], 8, generator=generator)
            tensor.copy_(draws.argsort(dim=-1)[..., : tensor.shape[-1]])
        elif not tensor.is_floating_point() or re.search(
            r"conv|A_log|dt_|inv_freq|norm|residual", name
        ):
            continue
        elif re.search(r"(gate|router)\.([a-z_\d]+\.)*weight$", name) and tensor.dim() == 2:
            tensor.normal_(0, 0.5, generator=generator)
        elif re.search(r"score_correction|expert_bias|balancing", name):
            tensor += torch.randn(tensor.shape, generator=generator) * 0.05
        elif tensor.dim() >= 2 or name.endswith("bias"):
            tensor.normal_(0, 0.08, generator=generator)
