"""From text to training batches: the tokenizer, token streams, and the windows drawn from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from adapmoe_lab.demo.corpus import Domain
from adapmoe_lab.models.demo_architecture import END_OF_TEXT


def train_tokenizer(domains: Sequence[Domain], vocabulary_size: int) -> Tokenizer:
    """Train a lossless byte-level BPE on the training split; the end-of-text token has id 0.

    Digits stand alone, so that numbers are spelt alike wherever they occur.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for d in domains for text in d.training), trainer)
    return tokenizer


def encode_stream(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Return int32[T]: every text's tokens, each text preceded by the end-of-text token."""
    end_of_text = [tokenizer.token_to_id(END_OF_TEXT)]
    pieces: list[Sequence[int]] = []
    for encoding in tokenizer.encode_batch_fast(list(texts)):
        pieces += [end_of_text, encoding.ids]
    return np.concatenate(
        [np.asarray(piece, np.int32) for piece in pieces] or [np.zeros(0, np.int32)]
    )


def windows(stream: np.ndarray, length: int, max_tokens: int | None = None) -> np.ndarray:
    """Cut a stream into int64[N, length + 1]: N windows, each one token longer than its targets.

    With `max_tokens`, about that many predicted tokens, in windows spread evenly over the stream.
    A stream shorter than one window gives one shorter window.
    """
    if len(stream) < 2:
        return np.zeros((0, length + 1), np.int64)
    length = min(length, len(stream) - 1)
    n_windows = (len(stream) - 1) // length
    chosen = n_windows if max_tokens is None else max(1, min(n_windows, max_tokens // length))
    starts = np.linspace(0, n_windows - 1, chosen).round().astype(np.int64) * length
    return stream[starts[:, None] + np.arange(length + 1)].astype(np.int64)


@dataclass(frozen=True)
class Mixture:
    """Token counts of the domains and the share of every batch that each one gets."""

    names: tuple[str, ...]
    n_tokens: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def by_size(cls, names: Sequence[str], n_tokens: Sequence[int], exponent: float) -> Mixture:
        """Give each domain a share in proportion to size ** exponent.

        1 reads every domain equally often; 0 would read equally many tokens of each.
        """
        scores = np.asarray(n_tokens, np.float64) ** exponent
        shares = tuple(float(share) for share in scores / scores.sum())
        return cls(tuple(names), tuple(n_tokens), shares)


class WindowSampler:
    """Draws windows from concatenated token streams, every domain in its own shuffled passes.

    A pass cuts its domain at a fresh random offset, so that no two passes show the same windows.
    """

    def __init__(self, mixture: Mixture, sequence_length: int, seed: int) -> None:
        short = [
            n
            for n, size in zip(mixture.names, mixture.n_tokens, strict=True)
            if size <= sequence_length
        ]
        if short:
            raise ValueError(
                f"too little training text for windows of {sequence_length} tokens in: "
                f"{', '.join(short)}; add text or use a shorter sequence_length."
            )
        self.mixture = mixture
        self.n_drawn = np.zeros(len(mixture.names), np.int64)
        self._length = sequence_length
        self._random = np.random.default_rng(seed)
        offsets = np.concatenate([[0], np.cumsum(mixture.n_tokens)[:-1]])
        self._passes = [
            self._endless(int(offset), size)
            for offset, size in zip(offsets, mixture.n_tokens, strict=True)
        ]

    def draw(self, n_windows: int) -> np.ndarray:
        """Return int64[n_windows]: where each window starts in the concatenated streams."""
        counts = self._random.multinomial(n_windows, self.mixture.shares)
        self.n_drawn += counts
        starts = [next(self._passes[d]) for d, count in enumerate(counts) for _ in range(count)]
        return np.asarray(starts, np.int64)

    def epochs(self) -> dict[str, float]:
        """Return how often each domain has been read so far."""
        read = self.n_drawn * self._length / np.asarray(self.mixture.n_tokens)
        return dict(zip(self.mixture.names, read.round(3).tolist(), strict=True))

    def _endless(self, offset: int, size: int) -> Iterator[int]:
        while True:
            shift = int(self._random.integers(min(self._length, size - self._length)))
            starts = np.arange(shift, size - self._length, self._length)
            yield from (offset + self._random.permutation(starts)).tolist()
