"""Text that comes in parts: where it ends, and what a token adds however long the text is."""

import pytest
from checkpoints import byte_tokenizer, sentencepiece_tokenizer
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


TOKENIZERS = [byte_tokenizer, sentencepiece_tokenizer]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(
    st.lists(st.sampled_from(["a", " ", " of", "é", "日本", "🙂🎉🎉", "\n", "!"]), max_size=30),
    st.integers(0, 60),
    st.integers(0, 12),
)
def test_parts_are_the_text(tokenizer, words, n_special, n_before):
    tokenizer = tokenizer()
    special = tokenizer.eos_token_id
    before = [*tokenizer("Once")["input_ids"], *[special] * n_before]
    ids = [*before, *tokenizer("".join(words))["input_ids"]]
    ids[n_special:n_special] = [special] * 10 if n_special > len(before) else []
    parts = list(text_of_tokens(tokenizer, before, ids[len(before) :]))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(before, skip_special_tokens=True) + "".join(parts) == whole


class Counting:
    """A tokenizer that remembers how many tokens it was given at once, time by time."""

    def __init__(self):
        self.inner, self.counts = byte_tokenizer(), []

    def decode(self, ids, **options):
        self.counts.append(len(ids))
        return self.inner.decode(ids, **options)


def test_a_token_costs_the_same_however_long_the_text_is():
    tokenizer = Counting()
    ids = tokenizer.inner("word " * 500)["input_ids"]
    assert "".join(text_of_tokens(tokenizer, ids[:1000], ids[1000:])) == "word " * 300
    assert max(tokenizer.counts[3:]) <= 2
