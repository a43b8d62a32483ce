"""Messages as the text that a model was trained to read, by its tokenizer's template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from adapmoe_lab.records.arguments import described

Message = Mapping[str, Any]
"""What one side says: its `role`, such as user, and its `content`."""


def checked_messages(name: str, messages: Any) -> list[Message]:
    """Return messages as a list.

    Raises:
        ValueError: they are none, or something else.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise ValueError(f"{name} must be one text or several messages, got {described(messages)}.")
    listed = list(messages)
    for number, message in enumerate(listed):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(
                f"{name}[{number}] must be a message such as "
                f"{{'role': 'user', 'content': 'Hello'}}, got {described(message)}."
            )
    return [dict(message) for message in listed]


def rendered(tokenizer: Any, messages: Sequence[Message], chat_template: str | None = None) -> str:
    """Return the text of messages, up to where the model's reply begins.

    Args:
        tokenizer: whose template is taken.
        messages: what was said so far.
        chat_template: a Jinja template in place of the tokenizer's.

    Raises:
        ValueError: there is no template, or it does not take these messages.
    """
    if chat_template is None and tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer of this model has no chat template: the model was not trained on "
            "messages. Give one text to continue, or the template as chat_template."
        )
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ValueError(f"The chat template does not take these messages: {error}") from error


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a rendered text, which names its special tokens itself."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
