"""How much memory a model's forward pass takes beside its weights, from its configuration."""

from __future__ import annotations

from transformers import PreTrainedConfig

WORK_TENSORS = 12
"""Tensors as large as the hidden states that are alive at once: residual, norm, query, key, …"""

SCORE_COPIES = 3
"""Masked, unmasked and normalised scores, in float32."""

LONGEST_DEFAULT_CONTEXT = 4096


def default_context_tokens(config: PreTrainedConfig) -> int:
    """Return the context that is planned for if the user names none."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(LONGEST_DEFAULT_CONTEXT, longest or LONGEST_DEFAULT_CONTEXT)


def kv_cache_bytes(config: PreTrainedConfig, n_tokens: int, item_bytes: int) -> int:
    """Return the bytes of a key-value cache of `n_tokens`, counting every layer as full attention.

    A layer that is run several times for each token has a cache of every run. Layers with a window
    or a recurrent state take less, so this is an upper bound.
    """
    text = config.get_text_config()
    n_heads = _most(text, "num_attention_heads")
    if getattr(text, "kv_lora_rank", None):  # multi-head latent attention, cached expanded
        per_layer = n_heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
    else:
        n_kv_heads = _most(text, "num_key_value_heads") or n_heads
        head_dim = _most(text, "head_dim") or text.hidden_size // n_heads
        per_layer = 2 * n_kv_heads * head_dim
    n_layers = getattr(text, "total_num_hidden_layers", text.num_hidden_layers)
    return n_layers * per_layer * n_tokens * item_bytes


def work_bytes(
    config: PreTrainedConfig, n_tokens: int, batch_size: int, top_k: int, item_bytes: int
) -> int:
    """Return the bytes of activations when `batch_size` sequences of `n_tokens` pass at once.

    The experts' contributions [T, K, D] may be in float32; logits are of the last token only.
    Attention is taken not to hold all scores at once; see `score_bytes` for where it does.
    """
    text, n_tokens = config.get_text_config(), n_tokens * batch_size
    widest = max(text.hidden_size * WORK_TENSORS, _most(text, "intermediate_size"))
    per_token = widest * item_bytes + 2 * top_k * text.hidden_size * 4
    return n_tokens * per_token + text.vocab_size * (item_bytes + 4)


def score_bytes(config: PreTrainedConfig, n_tokens: int, batch_size: int) -> int:
    """Return the bytes of attention's scores [B, heads, T, T] where they are all held at once.

    Some attention does so: the eager one, and float32 on CUDA, which no fused kernel takes with
    grouped queries.
    """
    scores = batch_size * _most(config.get_text_config(), "num_attention_heads") * n_tokens**2
    return SCORE_COPIES * scores * 4


def _most(config: PreTrainedConfig, name: str) -> int:
    """Return a number of a configuration, the largest where it is given layer by layer; else 0."""
    value = getattr(config, f"{name}_per_layer", None) or getattr(config, name, None) or 0
    return max(value) if isinstance(value, list | tuple) else value
