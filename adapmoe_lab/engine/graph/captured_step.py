"""A decode step as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import sdpa_kernel

from adapmoe_lab.engine.graph.captured_choice import CapturedChoice
from adapmoe_lab.engine.graph.compiling import CompileWarning, compiled, compiling
from adapmoe_lab.engine.graph.recording import Graph, recorded
from adapmoe_lab.engine.graph.requirements import REMEDY, CaptureError, reason_of
from adapmoe_lab.engine.graph.served_step import ServedStep
from adapmoe_lab.engine.host_driven.decoder import STEADY_ATTENTION
from adapmoe_lab.engine.rounding import rounding_bound
from adapmoe_lab.models.hooks.device_constants import DeviceConstants
from adapmoe_lab.models.hooks.experts_hook import traced
from adapmoe_lab.models.hooks.key_value_cache import forward_cached, static_cache
from adapmoe_lab.models.hooks.observing import hooks_of

N_PROVED = 3
"""Steps that are compared with plain ones before a graph is trusted."""


class CapturedStep:
    """One token through a model as one graph, its keys and values in a cache of fixed length.

    Attributes:
        served: what serves its experts.
        cache: keys and values of the present sequence.
        context_tokens: how many tokens they have room for.
        sequence: counts the sequences begun.
        choice: what chooses tokens by its logits; None until it is captured.
    """

    def __init__(
        self,
        hf: nn.Module,
        served: ServedStep,
        context_tokens: int,
        capturing: Callable[[], AbstractContextManager[None]],
        compiles: bool = False,
    ) -> None:
        """Prepare a step.

        Args:
            hf: the model.
            served: what serves its experts.
            context_tokens: how many tokens keys and values have room for.
            capturing: lets the model's experts be run by `served`.
            compiles: whether the forward is compiled before it is captured.
        """
        self.served = served
        self.context_tokens = context_tokens
        self.cache = static_cache(hf, context_tokens)
        self.sequence = 0
        self.choice: CapturedChoice | None = None
        self._hf = hf
        self._capturing = capturing
        self._compiles = compiles
        self._graph: Graph | None = None
        self._constants = DeviceConstants(hf.device)  # pyright: ignore
        self._hooks = hooks_of(hf)
        self._token = torch.zeros((1, 1), dtype=torch.int64, device=hf.device)  # pyright: ignore

    def begin(self) -> int:
        """Begin a sequence, which ends the one before, and return its number.

        See `notice_hooks`.
        """
        self.notice_hooks()
        self.cache.reset()
        self.sequence += 1
        return self.sequence

    def notice_hooks(self) -> None:
        """Capture anew under other hooks than those that were on the model's modules before.

        A graph does what they did when it was captured.
        """
        if self._hooks != hooks_of(self._hf):
            self._hooks = hooks_of(self._hf)
            self._forget()

    def end(self) -> None:
        """Give up graph, keys and values; whoever still holds this can do nothing with it."""
        self._forget()
        del self.cache

    def compile(self) -> None:
        """Compile the forward before the next replay, if it is not, and capture it anew."""
        if not self._compiles:
            self._compiles = True
            self._forget()

    def _forget(self) -> None:
        """Capture the next step anew."""
        self._graph = self.choice = None

    def run(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Run tokens [T] by a plain forward pass; return the logits [V] of what follows them.

        Autocast around it changes nothing: keys, values and kernels are of one precision.
        """
        return self._run(token_ids, self._hf)

    @torch.inference_mode(False)  # what is allocated here outlives the caller's mode
    @torch.no_grad()
    def _run(self, token_ids: torch.Tensor, forward: Callable[..., Any]) -> torch.Tensor:
        unchanged = torch.autocast(self._token.device.type, enabled=False)
        with torch.cuda.device_of(self._token), unchanged, sdpa_kernel(STEADY_ATTENTION):
            logits, _ = forward_cached(
                self._hf, token_ids[None], self.cache, forward=forward, logits_to_keep=1
            )
        return logits[0, -1]

    def replay(self, token: int) -> torch.Tensor:
        """Run a token by the graph; return the logits [V], overwritten by the next."""
        assert self._graph is not None  # noqa: S101 `capture` was called before
        with torch.cuda.device_of(self._token):
            self._token.fill_(token)
            self._graph.replay()
        return self._logits

    def can_be_replayed(self, n_before: int) -> bool:
        """Whether it is captured, or can be behind so many tokens: with room for the proof.

        A first token makes the states that others replace, where a model keeps some.
        """
        if n_before == 0 and self.cache.keeps_states:
            return False
        return self._graph is not None or self.context_tokens - n_before >= N_PROVED

    @torch.inference_mode(False)
    def capture(self, n_before: int) -> None:
        """Capture the step behind `n_before` tokens, if it is not, and prove it.

        Residency, counters and the cache are as before. What rehearses writes keys and values where
        steps themselves will write them.

        Raises:
            CaptureError: the model's forward cannot be captured, or replays something else.
        """
        if self._graph is not None:
            return
        with torch.cuda.device_of(self._token), self.cache.marked():
            try:
                self.served.tables.rehearse(True)
                self._graph = self._compiled(n_before) or self._proved(n_before, self._hf)
            finally:
                self.served.tables.rehearse(False)
                self.cache.rewind(n_before)

    def _compiled(self, n_before: int) -> Graph | None:
        """Return the step compiled and captured; None where it is not to be, or cannot."""
        if not self._compiles:
            return None
        try:
            with compiling(), traced(self._hf):
                return self._proved(n_before, compiled(self._hf))
        except CaptureError as error:
            why = f"Captured steps are not compiled: {reason_of(error)}."
            warnings.warn(why, CompileWarning, stacklevel=2)
            return None

    def _proved(self, n_before: int, forward: Callable[..., Any]) -> Graph:
        """Return the step as a graph that replays what a plain step computes."""
        repeating = self._constants if forward is self._hf else nullcontext()

        def run() -> torch.Tensor:
            with self._capturing(), repeating:
                return self._run(self._token[0], forward)

        graph, self._logits = recorded(run, lambda: self.cache.rewind(n_before))
        self._prove(graph, n_before, run)
        self.choice = CapturedChoice(self._logits)
        return graph

    def _prove(self, graph: Graph, n_before: int, run: Callable[[], torch.Tensor]) -> None:
        """Compare replays with plain steps of the same kernels, over several positions.

        A capture that runs is not yet right: what a forward keeps in Python, such as a length, is
        replayed as it was. What was compiled, or repeats constants, is compared with the model
        itself, too; there a router that is between two experts may choose the other by rounding, so
        most positions must agree.
        """

        def replayed() -> torch.Tensor:
            graph.replay()
            return self._logits

        def uncompiled() -> torch.Tensor:
            with self._capturing():
                return self.run(self._token[0])

        expected = self._logits_of(run, n_before)
        errors = _relative_errors(self._logits_of(replayed, n_before), expected)
        bound = rounding_bound(self._logits.dtype)
        of_change = float(
            _relative_errors(expected, self._logits_of(uncompiled, n_before)).median()
        )
        for error, what in (
            (float(errors.max()), "captured step gives other logits than a plain one"),
            (of_change, "step that is captured gives other logits than the model"),
        ):
            if not error <= bound:
                raise CaptureError(
                    f"The {what}, by {error:.1e} where {bound:.1e} is rounding: the forward of "
                    f"this model depends on what a graph does not see. {REMEDY}"
                )

    def _logits_of(self, run: Callable[[], torch.Tensor], n_before: int) -> torch.Tensor:
        """Return the logits [N, V] of some tokens behind `n_before` others."""
        self.cache.rewind(n_before)
        found = []
        for token in range(N_PROVED):
            self._token.fill_(token)
            found.append(run().float().clone())
        return torch.stack(found)


def _relative_errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the errors [N] of logits [N, V], in what was expected of each."""
    return (found - expected).norm(dim=1) / expected.norm(dim=1)
