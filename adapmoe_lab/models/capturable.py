"""Which families' decode steps are captured as CUDA graphs, and why those of others are not.

What a family is not said to be here is tried all the same: a captured step is compared with plain
ones before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CAPTURED = frozenset(
    {
        "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2",
        "deepseek_v3", "deepseek_v32", "dots1", "dots3_note", "dots3_note_text", "ernie4_5_moe",
        "exaone_moe", "flex_olmo", "flint", "gemma4", "gemma4_text", "glm4_moe", "glm4_moe_lite",
        "glm_moe_dsa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
        "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_loop_text", "inkling2_text", "inkling_text",
        "jamba", "kimi_linear", "kolibri1", "laguna", "lara_mini", "lfm2_moe", "mellum",
        "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "mixtral", "olmoe", "phimoe",
        "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "solar_open",
        "zaya",
    }
)  # fmt: skip
"""Families whose captured steps give the unmodified model's logits in the tests."""

_TRANSPOSED = "its experts are stored transposed"
_UNGATED = "its experts have an up projection and no gate"
_INDEXER = "its indexer asks the host which positions are visible"

NOT_CAPTURED: Mapping[str, str] = MappingProxyType(
    {
        "aria_text": _TRANSPOSED,
        "deepseek_v4": "transformers has no static cache for its compressed keys and values",
        "gpt_oss": f"{_TRANSPOSED}, with biases",
        "minimax": "its forward takes no cache but one of its own",
        "nemotron_h": _UNGATED,
        "qwen4_exp": _INDEXER,
        "qwen4_exp_text": _INDEXER,
    }
)
"""Families whose steps the host must drive, each with the reason."""


def capture_in_words(model_type: str) -> str:
    """Return what is known of a family's captured steps, for documentation and the doctor."""
    if model_type in NOT_CAPTURED:
        return f"not captured: {NOT_CAPTURED[model_type]}"
    return "captured" if model_type in CAPTURED else "never tried; compared with plain ones at use"
