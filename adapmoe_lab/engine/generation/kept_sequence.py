"""A sequence that is gone on with: what was run once is not run again."""

from __future__ import annotations

from collections.abc import Callable

import torch

from adapmoe_lab.engine.executor import Decoder, TokenSampler
from adapmoe_lab.engine.sampling import Sampling


class KeptSequence:
    """A `Decoder` that is given whole texts, and runs only what the one before did not hold."""

    def __init__(self, begin: Callable[[], Decoder], run_under: Callable[[], object]) -> None:
        """Begin without tokens.

        Args:
            begin: returns what decodes a new sequence.
            run_under: returns what keys and values depend on; those of another are not kept.
        """
        self.has_ended = False
        self._begin = begin
        self._run_under = run_under
        self._ran_under: object = None
        self._decoder: Decoder | None = None
        self._tokens: list[int] = []

    def prefill(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Run a whole text, int64 [T], or what it adds to the tokens run before; return logits [V].

        Where it does not go on from them, or they were lost, all of it is run.
        """
        n_before = len(self._tokens)
        is_lost = self._decoder is None or self._decoder.has_ended
        is_lost = is_lost or self._run_under() is not self._ran_under
        if is_lost or n_before >= len(token_ids) or token_ids[:n_before].tolist() != self._tokens:
            self._decoder, n_before = None, 0
        decoder = self._taken() or self._begin()
        logits = decoder.prefill(token_ids[n_before:])
        self._decoder, self._tokens = decoder, token_ids.tolist()
        self._ran_under = self._run_under()
        return logits

    def step(self, token: int) -> torch.Tensor:
        """Run one token more; return the logits [V] of what follows it."""
        decoder = self._taken()
        if decoder is None:
            raise _nothing_run()
        logits = decoder.step(token)
        self._decoder = decoder
        self._tokens.append(token)
        return logits

    def sampler(self, sampling: Sampling, text: torch.Tensor) -> TokenSampler:
        """Return what chooses the tokens that follow the text that was run, int64 [T]."""
        if self._decoder is None:
            raise _nothing_run()
        return self._decoder.sampler(sampling, text)

    def _taken(self) -> Decoder | None:
        """Return the decoder; without it, a pass that fails leaves nothing to go on from."""
        decoder, self._decoder = self._decoder, None
        return decoder


def _nothing_run() -> RuntimeError:
    return RuntimeError("No text was run before this token; run one with prefill.")
