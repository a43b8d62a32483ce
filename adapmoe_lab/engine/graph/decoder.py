"""A sequence that is decoded by replays of one captured step."""

from __future__ import annotations

from typing import Protocol

import torch

from adapmoe_lab.engine.graph.captured_choice import ReplayedSampler
from adapmoe_lab.engine.graph.captured_step import CapturedStep
from adapmoe_lab.engine.host_driven.decoder import UnbrokenPasses
from adapmoe_lab.engine.sampling import Sampling


class Replaying(Protocol):
    """What lets steps be replayed.

    Attributes:
        device: where it computes.
    """

    device: torch.device

    def has_captured(self, step: CapturedStep) -> bool:
        """Whether a step is that of the present slots."""
        ...

    def check_open(self) -> None:
        """Raise RuntimeError if it was closed."""
        ...

    def lets_replay(self, n_before: int) -> bool:
        """Let the step behind `n_before` tokens be replayed; False where the host must run it."""
        ...

    def count_replay(self) -> None:
        """Count a step that was replayed."""
        ...


class GraphDecoder:
    """A `Decoder` whose steps are replayed."""

    def __init__(self, executor: Replaying, step: CapturedStep) -> None:
        """Begin a sequence, which ends the one before it."""
        self._executor = executor
        self._step = step
        self._sequence = self._step.begin()
        self._n_tokens = 0
        self._unbroken = UnbrokenPasses()

    @property
    def has_ended(self) -> bool:
        """Whether a pass was interrupted, another sequence has begun, or the slots have changed."""
        return self._unbroken.was_interrupted or not self._is_present

    def prefill(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Run a prompt, int64 [T]; return the logits [V] of what follows it."""
        self._check(len(token_ids))
        self._step.notice_hooks()
        with self._unbroken.passing():
            logits = self._step.run(token_ids.to(self._executor.device))
        self._n_tokens += len(token_ids)
        return logits

    def step(self, token: int) -> torch.Tensor:
        """Run one token more; return the logits [V] of what follows it, valid until the next."""
        self._check(1)
        with self._unbroken.passing():
            if self._executor.lets_replay(self._n_tokens):
                logits = self._step.replay(token)
                self._executor.count_replay()
            else:
                logits = self._step.run(torch.tensor([token], device=self._executor.device))
        self._n_tokens += 1
        return logits

    def sampler(self, sampling: Sampling, text: torch.Tensor) -> ReplayedSampler:
        """Return what chooses the tokens that follow a text, int64 [T], until there is another."""
        return ReplayedSampler(lambda: self._step.choice, sampling, text)

    @property
    def _is_present(self) -> bool:
        """Whether this is the last sequence begun, in the present slots."""
        is_current = self._executor.has_captured(self._step)
        return is_current and self._step.sequence == self._sequence

    def _check(self, n_more: int) -> None:
        """Refuse to go on with a sequence that has ended, or past the cache's end."""
        self._executor.check_open()
        if not self._is_present:
            raise RuntimeError(
                "Another sequence has begun, or the slots have changed, since this one did; "
                "executor='graph' decodes one at a time. Begin again with model.decoder()."
            )
        n_tokens, room = self._n_tokens + n_more, self._step.context_tokens
        if n_tokens > room:
            raise ValueError(
                f"A text of {n_tokens} tokens does not fit the {room} that executor='graph' has "
                f"room for; load the model with max_context_tokens={n_tokens} or more."
            )
