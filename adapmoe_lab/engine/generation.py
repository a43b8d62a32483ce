"""Token-by-token generation with a key-value cache, and a look at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapmoe_lab.models.hooks.key_value_cache import forward_cached

StepCallback = Callable[[int], None]

STEADY_ATTENTION = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Attention kernels that take any length as it comes.

cuDNN's, which torch may choose on an H100, builds a plan for every new length, and every step of
decoding has one (https://github.com/pytorch/pytorch/pull/155958).
"""


@torch.no_grad()
def decode(
    hf: nn.Module,
    prompt: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop_ids: frozenset[int] = frozenset(),
    after_step: StepCallback | None = None,
) -> list[int]:
    """Return the token ids that follow a prompt.

    Args:
        hf: a transformers causal language model.
        prompt: token ids int64 [T], on any device.
        max_new_tokens: at most this many tokens are produced.
        temperature: 0 takes the likeliest token; otherwise samples from the softmax.
        generator: source of randomness for sampling, on the CPU.
        stop_ids: a produced token among these ends the text and is not returned.
        after_step: called with the number of the step once its token is known on the host;
            step 0 is the prefill.
    """
    produced: list[int] = []
    step_input: torch.Tensor = prompt[None].to(hf.device)  # pyright: ignore  [1, T]
    cache: Any = None
    for step in range(max_new_tokens):
        with sdpa_kernel(STEADY_ATTENTION):
            logits, cache = forward_cached(hf, step_input, cache, logits_to_keep=1)
        token = _choose(logits[0, -1], temperature, generator)
        if after_step is not None:
            after_step(step)
        if token in stop_ids:
            break
        produced.append(token)
        step_input = torch.full_like(step_input[:, :1], token)
    return produced


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.float().cpu() / temperature).softmax(dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
