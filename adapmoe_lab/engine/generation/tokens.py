"""Token-by-token generation: the one loop that generating, streaming and measuring share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from adapmoe_lab.engine.executor import Decoder
from adapmoe_lab.engine.sampling import Sampling

GREEDY = Sampling()


def generate_tokens(
    decoder: Decoder,
    prompt: torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Yield the token ids that follow a prompt, each once it is known on the host.

    The first comes after the prefill, every other after a step of its own. A step is begun only
    when its token is wanted.

    Args:
        decoder: what runs the model; the prompt begins its sequence.
        prompt: token ids int64 [T], on any device.
        max_new_tokens: at most this many tokens are produced.
        sampling: how they are chosen.
        stop_ids: a produced token among these ends the text and is not given.
    """
    if max_new_tokens < 1:
        return
    logits = decoder.prefill(prompt)
    sampler = decoder.sampler(sampling, prompt)
    for n_left in reversed(range(max_new_tokens)):
        token = sampler.choose(logits)
        if token in stop_ids:
            return
        yield token
        if n_left:
            logits = decoder.step(token)


def one_by_one(
    tokens: Iterator[int], in_use: AbstractContextManager[object], check: Callable[[], None]
) -> Iterator[int]:
    """Yield tokens, each decoded within a lock after a check, whichever thread wants it."""
    while True:
        with in_use:
            check()
            token = next(tokens, None)
        if token is None:
            return
        yield token
