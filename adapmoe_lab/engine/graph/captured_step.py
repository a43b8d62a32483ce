"""A decode step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import sdpa_kernel

from adapmoe_lab.engine.graph.served_step import ServedStep
from adapmoe_lab.engine.host_driven.decoder import STEADY_ATTENTION
from adapmoe_lab.models.hooks.key_value_cache import forward_cached, rewind, static_cache

N_REHEARSALS = 2
"""Steps before the capture: kernels compile, and libraries set up their workspaces."""


class CapturedStep:
    """One token through a model as one graph, its keys and values in a cache of fixed length.

    Attributes:
        served: what serves its experts.
        cache: keys and values of the present sequence.
        context_tokens: how many tokens they have room for.
        sequence: counts the sequences begun.
    """

    def __init__(
        self,
        hf: nn.Module,
        served: ServedStep,
        context_tokens: int,
        capturing: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Prepare a step; `capturing` lets the model's experts be run by `served`."""
        self.served = served
        self.context_tokens = context_tokens
        self.cache: Any = static_cache(hf, context_tokens)
        self.sequence = 0
        self._hf = hf
        self._capturing = capturing
        self._graph: torch.cuda.CUDAGraph | None = None
        self._token = torch.zeros((1, 1), dtype=torch.int64, device=hf.device)  # pyright: ignore

    def begin(self) -> int:
        """Begin a sequence, which ends the one before, and return its number."""
        self.cache.reset()
        self.sequence += 1
        return self.sequence

    @torch.no_grad()
    def run(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Run tokens [T] by a plain forward pass; return the logits [V] of what follows them."""
        with sdpa_kernel(STEADY_ATTENTION):
            logits, _ = forward_cached(self._hf, token_ids[None], self.cache, logits_to_keep=1)
        return logits[0, -1]

    def replay(self, token: int, n_before: int) -> torch.Tensor:
        """Run a token after `n_before` others; return the logits [V], overwritten by the next."""
        self._token.fill_(token)
        if self._graph is None:
            self._capture(n_before)
        assert self._graph is not None  # noqa: S101 it was captured
        self._graph.replay()
        return self._logits

    def _capture(self, n_before: int) -> None:
        """Capture the step, and leave residency, counters and the cache as they were.

        A rehearsal writes keys and values where the step itself will write them.
        """
        aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream())
        self.served.tables.rehearse(True)
        try:
            with self._capturing(), torch.cuda.stream(aside):
                for _ in range(N_REHEARSALS):
                    self.run(self._token[0])
                    rewind(self.cache, n_before)
            torch.cuda.current_stream().wait_stream(aside)
            with self._capturing(), torch.cuda.graph(graph):
                self._logits = self.run(self._token[0])
        finally:
            rewind(self.cache, n_before)
            self.served.tables.rehearse(False)
        self._graph = graph
