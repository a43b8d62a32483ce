"""Text from tokens, part by part as they come, up to where it shall end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Stands at the end of a text for a character whose last bytes are still missing."""


def text_of_tokens(tokenizer: Any, ids: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield what tokens add to a text, each part once no later token can change it.

    Special tokens are left out. A character of several tokens comes with the last of them. What a
    token adds is seen beside the part before it, so that it costs the same in a long text: decoded
    alone it may lose a space, and decoded from within a character it is none.

    Args:
        tokenizer: turns ids into text.
        ids: the tokens of the text so far.
        tokens: those that follow.
    """

    def decoded(window: Sequence[int]) -> str:
        return tokenizer.decode(window, skip_special_tokens=True)

    window, n_shown = list(ids), len(ids)
    shown = text = decoded(window)
    for token in tokens:
        window.append(token)
        text = decoded(window)
        if not text.endswith(INCOMPLETE):
            yield text[len(shown) :]
            if decoded(window[n_shown:]):
                window = window[n_shown:]
                text = decoded(window)
            n_shown, shown = len(window), text
    if text != shown:
        yield text[len(shown) :]


def text_before(parts: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield a text up to the string that is complete first, which is not given; then take no more.

    What may be the beginning of one is kept back until it is known not to be.
    """
    held = ""
    for part in parts:
        held += part
        begun = [(held.find(stop) + len(stop), held.find(stop)) for stop in stops if stop in held]
        if begun:
            _, first = min(begun)
            if first:
                yield held[:first]
            return
        n_kept = max((_n_begun(held, stop) for stop in stops), default=0)
        if n_kept < len(held):
            yield held[: len(held) - n_kept]
            held = held[len(held) - n_kept :]
    if held:
        yield held


def _n_begun(text: str, stop: str) -> int:
    """Return how many characters of a string, not all, a text ends with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
