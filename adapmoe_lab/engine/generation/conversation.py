"""A conversation with a model: messages and replies, in one sequence that is gone on with."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress

from adapmoe_lab.engine.generation.chat import (
    Message,
    check_template,
    checked_messages,
    encoded,
    encoded_after,
    rendered,
)
from adapmoe_lab.engine.generation.kept_sequence import KeptSequence
from adapmoe_lab.engine.generation.text import text_before, text_of_tokens
from adapmoe_lab.engine.generation.wanted import WantedText
from adapmoe_lab.engine.generation.writing import Writer, not_empty, tokens_after
from adapmoe_lab.records.arguments import one_string


class Conversation:
    """What was said to a model and what it replied, its keys and values kept from turn to turn.

    A turn runs only what it adds. All is run again where the model has served another config or,
    with `executor="graph"`, another sequence since; where a stop string cut the last reply; and
    where the template rewrites what was said before. One thread at a time takes turns.
    """

    def __init__(
        self,
        model: Writer,
        wanted: WantedText,
        messages: Sequence[Message] = (),
        chat_template: str | None = None,
    ) -> None:
        """Begin after some messages.

        Args:
            model: who replies.
            wanted: what a reply shall be.
            messages: what was said before.
            chat_template: a Jinja template in place of the tokenizer's.

        Raises:
            ValueError: the messages are something else, or there is no template for them.
        """
        check_template(model.tokenizer, chat_template)
        self._model = model
        self._wanted = wanted
        self._messages = checked_messages("messages", messages)
        self._template = chat_template
        self._sequence = KeptSequence(model.decoder, lambda: model.config)
        self._said: tuple[str, list[int]] = "", []
        self._turn: Generator[str] | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
        """What was said, replies included; of one under way, nothing yet."""
        return tuple(self._messages)

    def say(self, text: str) -> str:
        """Return the reply to a message.

        A turn that is interrupted, or fails, is taken back: the conversation is as before.
        """
        with self._model.in_use:
            return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """Yield the reply to a message as it comes.

        Closing it ends the reply there, as does the next turn; what came by then was said. Of a
        stream that nobody began to read, nothing was said.

        Raises:
            ValueError: it is not one text, or the template does not take it.
            RuntimeError: meanwhile another config came into force, the model was closed, or, with
                `executor="graph"`, another text was begun; or another thread reads a reply.
        """
        said = _message("user", one_string("text", text))
        self._end_turn()
        messages = [*self._messages, said]
        self._turn = self._reply(messages, self._rendered(messages))
        return self._turn

    def _end_turn(self) -> None:
        """End the reply that is under way, if there is one."""
        try:
            if self._turn is not None:
                self._turn.close()
        except ValueError as error:
            raise RuntimeError(
                "Another thread is reading a reply of this conversation; take one turn at a time."
            ) from error

    def _reply(self, messages: list[Message], prompt: str) -> Generator[str]:
        """Yield the reply to messages that are rendered, and keep both once it has ended."""
        tokenizer, reply = self._model.tokenizer, ""
        ids, tokens = self._ids(prompt), []
        following = tokens_after(self._model, ids, self._wanted, lambda: self._sequence)
        whole = text_of_tokens(tokenizer, ids, _noted(following, tokens))
        try:
            for part in text_before(whole, tuple(self._wanted.stop)):
                reply += part
                yield part
        except GeneratorExit:
            pass
        self._messages = [*messages, self._as_rendered(messages, prompt, reply)]
        is_whole = reply == "".join(text_of_tokens(tokenizer, ids, tokens))
        self._said = (prompt + reply, ids + tokens) if is_whole else ("", [])

    def _as_rendered(self, messages: list[Message], prompt: str, reply: str) -> Message:
        """Return a reply as the message that the template makes this very text of.

        Templates of models whose replies begin with a space put it there themselves.
        """
        for content in (reply, reply.lstrip()):
            message = _message("assistant", content)
            with suppress(ValueError):  # a template may refuse to go on after a reply
                if self._rendered([*messages, message]).startswith(prompt + reply):
                    return message
        return _message("assistant", reply)

    def _ids(self, prompt: str) -> list[int]:
        """Return the tokens of a rendered prompt, those of the model's own replies as it chose."""
        tokenizer, (said, ids) = self._model.tokenizer, self._said
        added = encoded_after(tokenizer, prompt, len(said)) if prompt.startswith(said) else None
        return not_empty(encoded(tokenizer, prompt) if added is None else ids + added)

    def _rendered(self, messages: Sequence[Message]) -> str:
        return rendered(self._model.tokenizer, messages, self._template)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _noted(tokens: Iterator[int], noted: list[int]) -> Iterator[int]:
    """Yield tokens and add each to a list."""
    for token in tokens:
        noted.append(token)
        yield token
