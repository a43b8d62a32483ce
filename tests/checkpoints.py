"""Small random checkpoints, written by transformers itself, for tests to load."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"


def save_tiny_mixtral(
    folder: Path, *, n_layers: int = 3, n_experts: int = 4, top_k: int = 2, seed: int = 0
) -> Path:
    """Write a random Mixtral checkpoint with spread-out routing and a byte tokenizer."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=n_experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    hf = MixtralForCausalLM(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 if name.endswith("gate.weight") else 0.15)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, so that any text has tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0, **{byte: i for i, byte in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
    )


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of characters and, for all others, bytes, made as Llama's is.

    A text is given a space that its tokens' text is without, and runs of bytes decode as one.
    """
    letters = ["\N{LOWER ONE EIGHTH BLOCK}", "\n", *map(chr, range(33, 127))]
    names = ["<unk>", "<s>", END, "<|x|>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token=names[0], byte_fallback=True)
    )
    space = letters[0]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(space, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = {"bos_token": "<s>", "eos_token": END, "extra_special_tokens": ["<|x|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
