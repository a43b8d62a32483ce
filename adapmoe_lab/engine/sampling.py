"""How the next token is chosen: greedily, or sampled with noise that any executor can repeat.

Sampling adds Gumbel noise to the scores and takes the largest, which draws from their softmax
(Gumbel 1954; https://arxiv.org/abs/2110.01515). The noise of a token is a function of the seed, the
position and the token alone, so that a text does not depend on what else was drawn, nor on where.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import torch

from adapmoe_lab.records.arguments import finite_number, whole_number

GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Constants of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, figure 17)."""

NOISE_BITS = 52
"""Bits of a uniform number: with one half added it is still a float64, and neither 0 nor 1."""


class Choice(Enum):
    """Kinds of choice; what else a choice depends on is data."""

    LIKELIEST = auto()
    AMONG_ALL = auto()
    AMONG_LIKELIEST = auto()


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. What is left out changes nothing.

    Attributes:
        temperature: 0 takes the likeliest token; higher samples more freely.
        top_k: sample among this many likeliest tokens, and those that equal the last of them.
        top_p: sample among the likeliest tokens that have at least this probability together.
        repetition_penalty: divides positive scores of tokens that the text holds already, and
            multiplies negative ones (https://arxiv.org/abs/1909.05858, section 4.1).
        seed: makes sampling repeatable; any integer of 64 bits.

    Raises:
        ValueError: a number is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Take numbers in the forms people pass them."""
        checked = {
            "temperature": finite_number("temperature", self.temperature, at_least=0),
            "seed": whole_number("seed", self.seed, at_least=-(2**63), at_most=2**64 - 1),
            "repetition_penalty": finite_number("repetition_penalty", self.repetition_penalty),
        }
        if checked["repetition_penalty"] <= 0:
            raise ValueError(
                "repetition_penalty must be a number above 0, where 1 changes nothing, got "
                f"{self.repetition_penalty}."
            )
        if self.top_k is not None:
            checked["top_k"] = whole_number("top_k", self.top_k, at_least=1)
        if self.top_p is not None:
            checked["top_p"] = finite_number("top_p", self.top_p, at_least=0, at_most=1)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def choice(self) -> Choice:
        """What kind of choice it is."""
        if self.temperature == 0:
            return Choice.LIKELIEST
        is_cut = self.top_k is not None or self.top_p is not None
        return Choice.AMONG_LIKELIEST if is_cut else Choice.AMONG_ALL


class SamplingData:
    """What the choice of a text's next token depends on beside logits, on the device.

    Its tensors never move, so that a captured choice follows a text that begins in them.

    Attributes:
        position: int64 [], how many tokens the text holds.
        is_in_text: bool [V], which.
        seed: int64 [].
        temperature: float64 []; so `top_p`.
        top_k: int64 [].
        top_p: see there.
        repetition_penalty: float32 [].
    """

    def __init__(self, n_tokens: int, device: torch.device) -> None:
        """Make the tensors for a vocabulary of so many tokens; `begin` fills them."""

        def number(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((), dtype=dtype, device=device)

        with torch.inference_mode(False):  # tokens may be chosen in another mode
            self.is_in_text = torch.zeros(n_tokens, dtype=torch.bool, device=device)
            self.position, self.seed, self.top_k = (number(torch.int64) for _ in range(3))
            self.temperature, self.top_p = number(torch.float64), number(torch.float64)
            self.repetition_penalty = number(torch.float32)

    def begin(self, sampling: Sampling, text: torch.Tensor) -> None:
        """Sample what follows a text, int64 [T]."""
        n_tokens = len(self.is_in_text)
        self.position.fill_(len(text))
        self.is_in_text.fill_(False).scatter_(0, text.to(self.position.device), True)
        self.seed.fill_(_signed(sampling.seed))
        self.temperature.fill_(sampling.temperature)
        self.top_k.fill_(n_tokens if sampling.top_k is None else min(sampling.top_k, n_tokens))
        self.top_p.fill_(torch.inf if sampling.top_p is None else sampling.top_p)
        self.repetition_penalty.fill_(sampling.repetition_penalty)

    def next_token(self, logits: torch.Tensor, choice: Choice) -> torch.Tensor:
        """Return the token [] that follows, by logits [V]; it belongs to the text from now on."""
        scores = penalised(logits.float(), self.is_in_text, self.repetition_penalty)
        if choice is not Choice.LIKELIEST:
            scores = (scores.double() - scores.max()) / self.temperature
            if choice is Choice.AMONG_LIKELIEST:
                scores = among_likeliest(scores, self.top_k, self.top_p)
            scores = scores + gumbel_noise(self.seed, self.position, len(scores))
        token = scores.argmax()
        self.position += 1
        self.is_in_text.scatter_(0, token[None], True)
        return token


class Sampler:
    """Chooses the tokens of one text, one after the other."""

    def __init__(self, sampling: Sampling, text: torch.Tensor) -> None:
        """Begin after a text, int64 [T]."""
        self._sampling = sampling
        self._text = text
        self._data: SamplingData | None = None

    def choose(self, logits: torch.Tensor) -> int:
        """Return the token that follows, by logits [V]; it belongs to the text from now on."""
        if self._data is None:
            self._data = SamplingData(len(logits), logits.device)
            self._data.begin(self._sampling, self._text)
        return int(self._data.next_token(logits, self._sampling.choice))


def penalised(
    logits: torch.Tensor, is_in_text: torch.Tensor, penalty: torch.Tensor | float
) -> torch.Tensor:
    """Return logits [V] with those of tokens that the text holds, bool [V], made less likely."""
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(is_in_text, lowered, logits)


def among_likeliest(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return scores [V] with the least likely at minus infinity, see `Sampling`.

    Of the `top_k` likeliest, int64 [], as many remain as have the probability `top_p` [] together.
    """
    ranked, order = scores.sort(descending=True, stable=True)
    ranked = ranked.masked_fill(ranked < ranked.gather(0, top_k[None] - 1), -torch.inf)
    probability = ranked.softmax(dim=-1)
    is_left_out = (probability.cumsum(dim=-1) - probability >= top_p) | ranked.isneginf()
    is_left_out[:1].fill_(False)
    return scores.masked_fill(is_left_out.scatter(0, order, is_left_out), -torch.inf)


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Return the noise of every token at a position of a text, float64 [V], both int64 []."""
    state = _mixed(seed + _signed(GAMMA))
    state = _mixed(state + (position + 1) * _signed(GAMMA))
    every = torch.arange(1, n_tokens + 1, device=seed.device)
    bits = _shifted(_mixed(state + every * _signed(GAMMA)), 64 - NOISE_BITS)
    return -torch.log(-torch.log((bits.double() + 0.5) / 2**NOISE_BITS))


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """Return the finaliser of SplitMix64 of 64-bit numbers; int64 wraps around."""
    numbers = (numbers ^ _shifted(numbers, 30)) * _signed(FIRST)
    numbers = (numbers ^ _shifted(numbers, 27)) * _signed(SECOND)
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Return unsigned numbers, kept in int64, shifted to the right."""
    return (numbers >> n_bits) & ((1 << (64 - n_bits)) - 1)


def _signed(number: int) -> int:
    """Return the int64 that has the lowest 64 bits of a number."""
    number &= 2**64 - 1
    return number - 2**64 if number >= 2**63 else number
