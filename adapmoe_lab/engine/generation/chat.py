"""Messages as the text that a model was trained to read, by its tokenizer's template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from adapmoe_lab.records.arguments import described, one_string

Message = Mapping[str, Any]
"""What one side says: its `role`, such as user, and its `content`."""

SUCH_AS = "{'role': 'user', 'content': 'Hello'}"


def checked_messages(name: str, messages: Any, or_else: str = "") -> list[Message]:
    """Return messages as a list; there may be none.

    Args:
        name: what the argument is called.
        messages: what was given.
        or_else: what else might have been given, for the error.

    Raises:
        ValueError: they are something else.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise ValueError(
            f"{name} must be {or_else}messages such as [{SUCH_AS}], got {described(messages)}."
        )
    listed = list(messages)
    for number, message in enumerate(listed):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(
                f"{name}[{number}] must be a message such as {SUCH_AS}, got {described(message)}."
            )
    return [dict(message) for message in listed]


def check_template(tokenizer: Any, chat_template: str | None) -> None:
    """Refuse to render messages without a template.

    Raises:
        ValueError: neither is one given, nor has the tokenizer one.
    """
    if chat_template is not None:
        one_string("chat_template", chat_template)
    elif tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer of this model has no chat template: the model was not trained on "
            "messages. Give one text to continue, or a template as chat_template."
        )


def rendered(tokenizer: Any, messages: Sequence[Message], chat_template: str | None = None) -> str:
    """Return the text of messages, up to where the model's reply begins.

    Args:
        tokenizer: whose template is taken.
        messages: what was said so far.
        chat_template: a Jinja template in place of the tokenizer's.

    Raises:
        ValueError: there is no template, or it does not take these messages.
    """
    check_template(tokenizer, chat_template)
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"The chat template does not take these messages: {error}") from error
    return one_string("what the chat template makes of the messages", text)


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a rendered text, which names its special tokens itself."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encoded_after(tokenizer: Any, text: str, n_characters: int) -> list[int] | None:
    """Return the tokens of a rendered text from a character on, as they are within the whole.

    None where a token begins before it and ends after it, or the tokenizer does not say.
    """
    if not tokenizer.is_fast:
        return None
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = encoding["offset_mapping"]
    if any(begin < n_characters < end for begin, end in spans):
        return None
    pairs = zip(encoding["input_ids"], spans, strict=True)
    return [token for token, (begin, _) in pairs if begin >= n_characters]
