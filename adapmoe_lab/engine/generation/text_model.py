"""What a model is to those who want texts of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from adapmoe_lab.engine.generation.chat import Message
from adapmoe_lab.engine.generation.conversation import Conversation
from adapmoe_lab.engine.generation.wanted import WantedText
from adapmoe_lab.engine.generation.writing import Writer, prompt_ids, written
from adapmoe_lab.engine.sampling import Sampling
from adapmoe_lab.records.arguments import one_string


class TextModel(Writer):
    """A model that continues texts, replies to messages and holds conversations.

    Attributes:
        hf: the transformers model.
    """

    hf: Any

    def encode(self, text: str) -> torch.Tensor:
        """Return the token ids of a text, int64 [T].

        Raises:
            ValueError: it is not one text.
        """
        ids = self.tokenizer(one_string("text", text))["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def generate(
        self,
        prompt: str | Sequence[Message],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Iterable[str] = (),
        chat_template: str | None = None,
    ) -> str:
        """Return a text continued by the model, or the reply to messages.

        Args:
            prompt: one text to continue; or messages, each with `role` and `content`, as the
                chat template takes them.
            max_new_tokens: at most this many tokens are added.
            temperature: 0 takes the likeliest token, higher samples more freely.
            seed: makes sampling repeatable; any integer of 64 bits.
            top_k: sample among this many likeliest tokens.
            top_p: sample among the likeliest tokens that have this probability together.
            repetition_penalty: above 1, tokens that the text holds already become less likely.
            stop: the text ends before the first of these strings.
            chat_template: a Jinja template for messages in place of the tokenizer's.

        Raises:
            ValueError: the prompt is empty or neither text nor messages, there is no template for
                them, or a number is out of range.
        """
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        wanted = WantedText(max_new_tokens, sampling, stop)
        ids = prompt_ids(self, prompt, chat_template)
        with self.in_use:
            text = "".join(written(self, ids, wanted))
        is_text = isinstance(prompt, str)
        return self.tokenizer.decode(ids, skip_special_tokens=True) + text if is_text else text

    def stream(
        self,
        prompt: str | Sequence[Message],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Iterable[str] = (),
        chat_template: str | None = None,
    ) -> Iterator[str]:
        """Yield the text that `generate` adds to a prompt, as it comes.

        Between two parts other threads may run the model, but not under another config. Arguments
        and errors are those of `generate`.

        Raises:
            RuntimeError: meanwhile another config came into force, the model was closed, or, with
                `executor="graph"`, another text was begun.
        """
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        wanted = WantedText(max_new_tokens, sampling, stop)
        return written(self, prompt_ids(self, prompt, chat_template), wanted)

    def conversation(
        self,
        messages: Sequence[Message] = (),
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Iterable[str] = (),
        chat_template: str | None = None,
    ) -> Conversation:
        """Return a conversation, whose turns run only what they add to it.

        Args:
            messages: what was said before, such as what the system says.
            max_new_tokens: at most this many tokens a reply; this and the next as in `generate`.
            temperature: see there.
            seed: see there.
            top_k: see there.
            top_p: see there.
            repetition_penalty: see there.
            stop: see there.
            chat_template: see there.

        Raises:
            ValueError: as `generate`.
        """
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        wanted = WantedText(max_new_tokens, sampling, stop)
        return Conversation(self, wanted, messages, chat_template)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        stop = self.hf.generation_config.eos_token_id
        return frozenset(stop if isinstance(stop, list) else [] if stop is None else [stop])
