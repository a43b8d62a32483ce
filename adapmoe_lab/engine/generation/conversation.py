"""A conversation with a model: messages and replies, in one sequence that is gone on with."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

from adapmoe_lab.engine.generation.chat import Message, checked_messages, encoded, rendered
from adapmoe_lab.engine.generation.kept_sequence import KeptSequence
from adapmoe_lab.engine.generation.text import text_before, text_of_tokens
from adapmoe_lab.engine.generation.wanted import WantedText
from adapmoe_lab.engine.generation.writing import Writer, tokens_after
from adapmoe_lab.records.arguments import one_string


class Conversation:
    """What was said to a model and what it replied, its keys and values kept from turn to turn.

    A turn runs only what it adds. All is run again where the model has served another config or,
    with `executor="graph"`, another sequence since; where a stop string cut the last reply; and
    where the template rewrites what was said before.
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
            ValueError: the messages are none, or there is no template for them.
        """
        self._model = model
        self._wanted = wanted
        self._messages = checked_messages("messages", messages)
        self._template = chat_template
        self._sequence = KeptSequence(model.decoder, lambda: model.config)
        self._said: tuple[str, list[int]] = "", []
        self._turn: Generator[str] | None = None
        rendered(model.tokenizer, [*self._messages, _message("user", "")], chat_template)

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

        Closing it ends the reply there, as does the next turn; what came by then was said.

        Raises:
            ValueError: it is not one text, or the template does not take it.
            RuntimeError: another config came into force, or the model was closed, meanwhile.
        """
        if self._turn is not None:
            self._turn.close()
        messages = [*self._messages, _message("user", one_string("text", text))]
        prompt = rendered(self._model.tokenizer, messages, self._template)
        self._turn = self._reply(messages, prompt)
        return self._turn

    def _reply(self, messages: list[Message], prompt: str) -> Generator[str]:
        """Yield the reply to messages that are rendered, and keep both once it has ended."""
        model, reply = self._model, ""
        ids, tokens = self._ids(prompt), []
        following = tokens_after(model, ids, self._wanted, self._sequence)
        whole = text_of_tokens(model.tokenizer, ids, _noted(following, tokens))
        try:
            for part in text_before(whole, tuple(self._wanted.stop)):
                reply += part
                yield part
        except GeneratorExit:
            pass
        self._messages = [*messages, _message("assistant", reply)]
        is_whole = reply == "".join(text_of_tokens(model.tokenizer, ids, tokens))
        self._said = (prompt + reply, ids + tokens) if is_whole else ("", [])

    def _ids(self, prompt: str) -> list[int]:
        """Return the tokens of a rendered prompt, those of the model's own replies as it chose."""
        said, ids = self._said
        if not prompt.startswith(said):
            said, ids = "", []
        return ids + encoded(self._model.tokenizer, prompt[len(said) :])


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _noted(tokens: Iterator[int], noted: list[int]) -> Iterator[int]:
    """Yield tokens and add each to a list."""
    for token in tokens:
        noted.append(token)
        yield token
