"""Tokenizer, token streams, and the windows that training and measuring take from them."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapmoe_lab.demo.corpus import Domain
from adapmoe_lab.demo.tokens import (
    Mixture,
    WindowSampler,
    encode_stream,
    train_tokenizer,
    windows,
)
from adapmoe_lab.models.demo_architecture import END_OF_TEXT

TEXT = ("Once upon a time there were 1234 bears. They said: 'Hello, 1234 bears!'\n",) * 50
LENGTH = 10


def trained(vocabulary_size=290):
    return train_tokenizer([Domain("stories", TEXT, (), (), ())], vocabulary_size)


TOKENIZER = trained()


def sampler_of(*sizes, seed=0, exponent=1.0):
    names = [f"domain{n}" for n in range(len(sizes))]
    return WindowSampler(Mixture.by_size(names, sizes, exponent), LENGTH, seed)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_encoding_loses_nothing(text):
    if END_OF_TEXT not in text:
        assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_frequent_words_are_merged_and_digits_never():
    tokens = TOKENIZER.encode("There were 1234 bears").tokens
    assert "Ġbears" in tokens
    with_digits = [token for token in TOKENIZER.get_vocab() if any(map(str.isdigit, token))]
    assert sorted(token for token in with_digits if token.isascii()) == list("0123456789")
    assert [token for token in tokens if token.isdigit()] == ["1", "2", "3", "4"]


def test_the_vocabulary_has_the_size_asked_for_and_end_of_text_comes_first():
    assert TOKENIZER.get_vocab_size() == 290
    assert TOKENIZER.token_to_id(END_OF_TEXT) == 0


def test_only_the_training_split_is_learnt():
    secret = ("zyxwv zyxwv",) * 100
    tokenizer = train_tokenizer([Domain("stories", TEXT, secret, secret, ())], 290)
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()


def test_a_stream_has_every_text_after_an_end_of_text():
    stream = encode_stream(TOKENIZER, ["one bear", "", "two"])
    one, two = TOKENIZER.encode("one bear").ids, TOKENIZER.encode("two").ids
    assert stream.dtype == np.int32
    assert stream.tolist() == [0, *one, 0, 0, *two]
    assert encode_stream(TOKENIZER, []).tolist() == []


def test_windows_predict_every_token_once():
    cut = windows(np.arange(95, dtype=np.int32), LENGTH)
    assert cut.dtype == np.int64
    assert cut.shape == (9, LENGTH + 1)
    assert cut[:, 1:].ravel().tolist() == list(range(1, 91))
    assert (cut[1:, 0] == cut[:-1, -1]).all()


@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 400))
def test_limited_windows_are_distinct_windows_of_the_whole(size, length, max_tokens):
    stream = np.arange(size)
    every = windows(stream, length)
    chosen = windows(stream, length, max_tokens)
    starts = chosen[:, 0].tolist()
    assert starts == sorted(set(starts))
    assert set(starts) <= set(every[:, 0].tolist())
    assert chosen.shape[1] == every.shape[1] == min(length, size - 1) + 1
    assert len(chosen) == max(1, min(len(every), max_tokens // (chosen.shape[1] - 1)))


def test_limited_windows_reach_both_ends():
    starts = windows(np.arange(1_001), LENGTH, 30)[:, 0].tolist()
    assert (starts[0], len(starts), starts[-1]) == (0, 3, 990)


def test_a_stream_too_short_for_a_window():
    assert windows(np.arange(5), LENGTH).tolist() == [[0, 1, 2, 3, 4]]
    assert windows(np.arange(1), LENGTH).shape == (0, LENGTH + 1)


def test_shares_follow_the_size_to_the_exponent():
    names, sizes = ("a", "b"), (100, 900)
    assert Mixture.by_size(names, sizes, 1.0).shares == pytest.approx((0.1, 0.9))
    assert Mixture.by_size(names, sizes, 0.0).shares == pytest.approx((0.5, 0.5))
    assert Mixture.by_size(names, sizes, 0.5).shares == pytest.approx((0.25, 0.75))


@given(st.integers(LENGTH + 1, 200), st.integers(0, 9))
def test_every_window_lies_inside_the_domain_it_was_drawn_for(size, seed):
    sampler = sampler_of(50, size, seed=seed)
    starts = sampler.draw(80)
    first = starts < 50
    assert first.sum() == sampler.n_drawn[0]
    assert (starts[first] + LENGTH < 50).all()
    assert (starts[~first] >= 50).all()
    assert (starts[~first] + LENGTH < 50 + size).all()


def test_a_pass_covers_its_domain_and_shows_no_window_twice():
    n_windows = 12  # of a domain that gives as many windows at every offset
    sampler = sampler_of((n_windows + 1) * LENGTH)
    passes = [sampler.draw(n_windows) for _ in range(20)]
    for starts in passes:
        ordered = sorted(starts.tolist())
        assert 0 <= ordered[0] < LENGTH
        assert all(later - earlier == LENGTH for earlier, later in pairwise(ordered))
    assert len({min(starts.tolist()) for starts in passes}) > 1
    assert any(starts.tolist() != sorted(starts.tolist()) for starts in passes)


def test_draws_follow_the_shares_and_are_counted():
    sampler = sampler_of(1_000, 3_000)
    sampler.draw(4_000)
    assert sampler.n_drawn.sum() == 4_000
    assert sampler.n_drawn[0] / 4_000 == pytest.approx(0.25, abs=0.03)
    epochs = sampler.epochs()
    assert list(epochs) == ["domain0", "domain1"]
    assert epochs["domain0"] == pytest.approx(sampler.n_drawn[0] * LENGTH / 1_000, abs=1e-3)


def test_the_seed_decides_the_draws():
    draws = [sampler_of(1_000, 500, seed=seed).draw(50).tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_a_domain_shorter_than_a_window_is_named():
    with pytest.raises(ValueError, match=r"windows of 10 tokens in: domain1; add text or use"):
        sampler_of(500, LENGTH)
    assert sampler_of(LENGTH + 1).draw(2).tolist() == [0, 0]
