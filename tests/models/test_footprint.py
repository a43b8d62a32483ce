"""Memory beside the weights, where configurations give their numbers layer by layer."""

from __future__ import annotations

from transformers import PreTrainedConfig

from adapmoe_lab.models.checkpoint.footprint import kv_cache_bytes, score_bytes, work_bytes

PLAIN = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 2048,
    "vocab_size": 100,
}
BY_LAYER = {
    "num_attention_heads": 1,
    "num_attention_heads_per_layer": [1, 4, 2],
    "num_key_value_heads": [1, 2, 2],
    "intermediate_size": [8, 2048, 2],
}


def test_the_largest_of_numbers_given_by_layer_counts():
    plain, listed = PreTrainedConfig(**PLAIN), PreTrainedConfig(**PLAIN | BY_LAYER)
    for count in (
        lambda config: kv_cache_bytes(config, 10, 2),
        lambda config: work_bytes(config, 10, 1, 2, 2),
        lambda config: score_bytes(config, 10, 1),
    ):
        assert count(listed) == count(plain) > 0
