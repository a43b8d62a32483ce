"""Texts written by a model under the config in force, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from adapmoe_lab.engine.executor import Decoder, Executor
from adapmoe_lab.engine.generation.chat import Message, checked_messages, encoded, rendered
from adapmoe_lab.engine.generation.text import text_before, text_of_tokens
from adapmoe_lab.engine.generation.tokens import generate_tokens, one_by_one
from adapmoe_lab.engine.generation.wanted import WantedText
from adapmoe_lab.records import TunedConfig
from adapmoe_lab.records.arguments import one_string


class Writer(Protocol):
    """What it takes of a model to write with it.

    Attributes:
        tokenizer: turns text into ids and back.
        config: the configuration in force.
        engine: what serves its experts.
        in_use: held while it runs.
    """

    tokenizer: Any
    config: TunedConfig
    engine: Executor
    in_use: AbstractContextManager[object]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        ...

    def decoder(self) -> Decoder:
        """Return what decodes one sequence under the config in force."""
        ...

    def encode(self, text: str) -> torch.Tensor:
        """Return the token ids of a text, int64 [T]."""
        ...


def prompt_ids(
    model: Writer, prompt: str | Sequence[Message], chat_template: str | None = None
) -> list[int]:
    """Return the tokens of a text to continue, or of messages to reply to.

    Raises:
        ValueError: it is neither, is empty, or there is no template for messages.
    """
    if isinstance(prompt, str):
        return not_empty(model.encode(one_string("prompt", prompt)).tolist())
    messages = checked_messages("prompt", prompt, or_else="one text or ")
    text = rendered(model.tokenizer, messages, chat_template) if messages else ""
    return not_empty(encoded(model.tokenizer, text))


def not_empty(ids: list[int]) -> list[int]:
    """Return the tokens of a prompt; raise ValueError if there are none."""
    if not ids:
        raise ValueError("The prompt is empty; give at least one word to continue.")
    return ids


def tokens_after(
    model: Writer, ids: Sequence[int], wanted: WantedText, begin: Callable[[], Decoder]
) -> Iterator[int]:
    """Yield the tokens that follow others; between two of them other threads may run the model.

    Args:
        model: what writes.
        ids: the tokens before.
        wanted: what is wanted of the text.
        begin: returns what decodes it, once the first token is wanted.

    Raises:
        RuntimeError: meanwhile another config came into force, the model was closed, or, where an
            executor decodes one sequence at a time, another was begun.
    """
    config = model.config

    def check_unchanged() -> None:
        model.engine.check_open()
        if model.config is not config:
            raise RuntimeError(
                "Another config came into force while a text was streamed; begin anew."
            )

    def tokens() -> Iterator[int]:
        prompt, sampling = torch.tensor(ids), wanted.sampling
        yield from generate_tokens(begin(), prompt, wanted.max_new_tokens, sampling, model.stop_ids)

    model.engine.check_open()
    return one_by_one(tokens(), model.in_use, check_unchanged)


def written(model: Writer, ids: Sequence[int], wanted: WantedText) -> Iterator[str]:
    """Return the text that follows tokens, part by part; see `tokens_after`."""
    tokens = tokens_after(model, ids, wanted, model.decoder)
    return text_before(text_of_tokens(model.tokenizer, ids, tokens), tuple(wanted.stop))
