"""Token-by-token generation: the one loop that generating, streaming and measuring share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from adapmoe_lab.engine.executor import Decoder

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Stands at the end of a text for a character whose last bytes are still missing."""


def generate_tokens(
    decoder: Decoder,
    prompt: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop_ids: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Yield the token ids that follow a prompt, each once it is known on the host.

    The first comes after the prefill, every other after a step of its own. A step is begun only
    when its token is wanted.

    Args:
        decoder: what runs the model; its sequence begins here.
        prompt: token ids int64 [T], on any device.
        max_new_tokens: at most this many tokens are produced.
        temperature: 0 takes the likeliest token; otherwise samples from the softmax.
        generator: source of randomness for sampling, on the CPU.
        stop_ids: a produced token among these ends the text and is not given.
    """
    if max_new_tokens < 1:
        return
    logits = decoder.prefill(prompt)
    for n_left in reversed(range(max_new_tokens)):
        token = _choose(logits, temperature, generator)
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


def text_of_tokens(tokenizer: Any, ids: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield what tokens add to a text, each part once no later token can change it.

    Special tokens are left out. A character of several tokens comes with the last of them.

    Args:
        tokenizer: turns ids into text.
        ids: the tokens of the text so far.
        tokens: those that follow.
    """
    every = list(ids)
    shown = text = tokenizer.decode(every, skip_special_tokens=True)
    for token in tokens:
        every.append(token)
        text = tokenizer.decode(every, skip_special_tokens=True)
        if not text.endswith(INCOMPLETE):
            yield text[len(shown) :]
            shown = text
    if text != shown:
        yield text[len(shown) :]


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> int:
    """Return the next token by logits [V]."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.float().cpu() / temperature).softmax(dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
