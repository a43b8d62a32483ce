"""Text that comes in parts: where it ends, and what a token adds however long the text is."""

import pytest
from checkpoints import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from adapmoe_lab.engine.generation.text import text_before, text_of_tokens

letters = st.text("abc", max_size=12)


def cut(text, stops):
    """Return what stands before the stop string that is complete first."""
    for end in range(len(text) + 1):
        begun = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begun:
            return text[: min(begun)]
    return text


@given(st.lists(letters, max_size=8), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_what_stops_it_however_it_comes(parts, stops):
    assert "".join(text_before(parts, stops)) == cut("".join(parts), stops)


def test_only_what_may_be_a_beginning_is_kept_back():
    assert list(text_before(["on", "ce E", "N", "d"], ["END"])) == ["on", "ce ", "ENd"]
    taken = iter(["x", "END", "more"])
    assert list(text_before(taken, ["END"])) == ["x"]
    assert list(taken) == ["more"]


@pytest.mark.parametrize("text", ["Größe: 5 µm, 日本語 🙂!", "Once upon a time. " * 30])
def test_parts_are_the_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    for n_before in (0, 2, 11):
        before = tokenizer.decode(ids[:n_before])
        parts = list(text_of_tokens(tokenizer, ids[:n_before], ids[n_before:]))
        assert before + "".join(parts) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


class Counting:
    """A tokenizer that remembers how many tokens it was ever given at once."""

    def __init__(self):
        self.inner, self.most = byte_tokenizer(), 0

    def decode(self, ids, **options):
        self.most = max(self.most, len(ids))
        return self.inner.decode(ids, **options)


def test_a_token_costs_the_same_however_long_the_text_is():
    tokenizer = Counting()
    ids = tokenizer.inner("word " * 500)["input_ids"]
    assert "".join(text_of_tokens(tokenizer, ids[:1000], ids[1000:])) == "word " * 300
    assert tokenizer.most < 32
