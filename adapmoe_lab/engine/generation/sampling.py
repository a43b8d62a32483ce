"""How the next token is chosen: greedily, or sampled with noise that any executor can repeat.

Sampling adds Gumbel noise to the scores and takes the largest, which draws from their softmax
(Gumbel 1954; https://arxiv.org/abs/2110.01515). The noise of a token is a function of the seed, the
position and the token alone, so that a text does not depend on what else was drawn, nor on where.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapmoe_lab.records.arguments import finite_number, whole_number

GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Constants of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, figure 17)."""

NOISE_BITS = 52
"""Bits of a uniform number: with one half added it is still a float64, and neither 0 nor 1."""


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


class Sampler:
    """Chooses the tokens of one text, one after the other."""

    def __init__(self, sampling: Sampling, prompt: torch.Tensor) -> None:
        """Begin after a prompt, int64 [T]."""
        self._sampling = sampling
        self._n_tokens = len(prompt)
        self._prompt = prompt
        self._is_in_text: torch.Tensor | None = None

    def choose(self, logits: torch.Tensor) -> int:
        """Return the token that follows, by logits [V]; it belongs to the text from now on."""
        if self._sampling.repetition_penalty != 1:
            if self._is_in_text is None:
                self._is_in_text = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
                self._is_in_text[self._prompt.to(logits.device)] = True
            penalty = self._sampling.repetition_penalty
            logits = penalised(logits.float(), self._is_in_text, penalty)
        token = int(chosen(logits, self._sampling, self._n_tokens))
        self._n_tokens += 1
        if self._is_in_text is not None:
            self._is_in_text[token] = True
        return token


def chosen(logits: torch.Tensor, sampling: Sampling, position: int) -> torch.Tensor:
    """Return the token [] at a position, by logits [V] that are penalised already."""
    if sampling.temperature == 0:
        return logits.argmax()
    scores = (logits.double() - logits.max()) / sampling.temperature
    if sampling.top_k is not None:
        scores = among_top_k(scores, sampling.top_k)
    if sampling.top_p is not None:
        scores = among_top_p(scores, sampling.top_p)
    noise = gumbel_noise(sampling.seed, position, len(scores), scores.device)
    return (scores + noise).argmax()


def penalised(logits: torch.Tensor, is_in_text: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return logits [V] with those of tokens that the text holds, bool [V], made less likely."""
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(is_in_text, lowered, logits)


def among_top_k(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return scores [V] with all but the `top_k` largest, and their equals, at minus infinity."""
    least = scores.topk(min(top_k, len(scores))).values[-1]
    return scores.masked_fill(scores < least, -torch.inf)


def among_top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return scores [V] with the least likely at minus infinity, see `Sampling.top_p`."""
    ranked, order = scores.sort(descending=True, stable=True)
    probability = ranked.softmax(dim=-1)
    is_enough_before = probability.cumsum(dim=-1) - probability >= top_p
    is_enough_before[0] = False
    is_left_out = torch.empty_like(is_enough_before).scatter_(0, order, is_enough_before)
    return scores.masked_fill(is_left_out, -torch.inf)


def gumbel_noise(seed: int, position: int, n_tokens: int, device: torch.device) -> torch.Tensor:
    """Return the noise of every token at a position of a text, float64 [V]."""
    state = _mixed(torch.tensor(_signed(seed + GAMMA), device=device))
    state = _mixed(state + _signed((position + 1) * GAMMA))
    every = torch.arange(1, n_tokens + 1, device=device)
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
