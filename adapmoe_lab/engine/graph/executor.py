"""The graph-captured executor: a decode step, attention and cache included, is one CUDA graph.

Prompts, and everything that is observed, run through the host-driven executor in the same slots.
Residency has one owner at a time: the host's cache or the device's tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from adapmoe_lab.engine.executor import Capabilities, Decoder
from adapmoe_lab.engine.graph.captured_step import CapturedStep
from adapmoe_lab.engine.graph.decoder import GraphDecoder
from adapmoe_lab.engine.graph.requirements import (
    CaptureError,
    PolicyError,
    capabilities,
    check_experts,
    reason_of,
)
from adapmoe_lab.engine.graph.served_step import ServedStep
from adapmoe_lab.engine.host_driven.executor import HostDrivenExecutor
from adapmoe_lab.engine.prefetch.predictors import Predictor
from adapmoe_lab.engine.store.expert_store import ExpertStore
from adapmoe_lab.models.families import Router
from adapmoe_lab.models.hooks.observing import Callback
from adapmoe_lab.models.support import UnsupportedModelError
from adapmoe_lab.policies.eviction.registry import policy_named
from adapmoe_lab.records import CachePlan, GatingTable, PrefetchTable, Surrogates, Traffic
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.step_costs import StepCosts


class GraphExecutor:
    """Decodes by replaying a captured graph; an `Executor`.

    Attributes:
        device: where it computes.
        clock: what time is read from.
        why_not_replayed: why steps run by the host; None where they are replayed.
    """

    def __init__(
        self,
        host: HostDrivenExecutor,
        store: ExpertStore,
        top_k: int,
        context_tokens: int,
        routers: Sequence[Router] = (),
        falls_back: bool = False,
        compiles: bool = False,
    ) -> None:
        """Decode beside a host-driven executor of the same model.

        Args:
            host: what runs prompts, and everything that is observed.
            store: all experts.
            top_k: experts that a token chooses.
            context_tokens: longest text that a captured step has room for.
            routers: of every layer; used only for eviction policies that read scores.
            falls_back: whether the host runs what cannot be captured, instead of an error.
            compiles: whether forwards are compiled before they are captured.

        Raises:
            ValueError: the experts are not what can be served so.
        """
        check_experts(store)
        self.device, self.clock = host.device, host.clock
        self._host = host
        self._store = store
        self._top_k = top_k
        self._context_tokens = context_tokens
        self._routers = routers
        self._policy = policy_named("lru")
        self._falls_back = falls_back
        self._compiles = compiles
        self._why_never: str | None = None
        self.why_not_replayed: str | None = None
        self._is_eager = False
        self._is_capturing = False
        self._captured: CapturedStep | None = None
        self._forget_step()

    @property
    def capabilities(self) -> Capabilities:
        """What it is able to run."""
        return self._host.capabilities if self._falls_back else self._of_steps

    @property
    def runs_steps_by(self) -> str:
        """What runs a decode step under the present configuration."""
        return "graph" if self.why_not_replayed is None else self._host.runs_steps_by

    @property
    def _of_steps(self) -> Capabilities:
        """What a captured step is able to run."""
        return capabilities(self._store.formats[0][0].fields[0].precision.name)

    def configure(
        self,
        gating: GatingTable | None,
        plan: CachePlan,
        eviction: str = "lru",
        surrogates: Surrogates | None = None,
        prefetch: PrefetchTable | None = None,
        predictors: Sequence[Predictor] = (),
        step_costs: StepCosts | None = None,
    ) -> None:
        """Start afresh with empty slots of a plan.

        What was captured goes on if policy and surrogates are the same, and layers share their
        slots if they did: slots, quotas and cuts are no part of it.

        Raises:
            ValueError: a captured step cannot run it.
        """
        why_not = self._why_never
        try:
            self._of_steps.check_parts(eviction, plan, gating, surrogates, prefetch)
        except ValueError as error:
            if not self._falls_back:
                raise
            why_not = reason_of(error)
        policy, captured = policy_named(eviction), self._captured
        before = self._policy, self.plan.is_global
        is_other = before != (policy, plan.is_global) or self.surrogates is not surrogates
        if is_other or why_not is not None:
            captured = None
        self._forget_step(captured)
        self._host.configure(gating, plan, eviction, surrogates, prefetch, predictors, step_costs)
        self._policy, self._captured, self.why_not_replayed = policy, captured, why_not
        if captured is not None:
            self._begin(captured.served)
            captured.begin()  # what was under way had other slots

    def release(self) -> None:
        """Give up all slots; experts then only stream."""
        self._forget_step()
        self._host.release()

    def decoder(self, hf: nn.Module) -> Decoder:
        """Return what decodes one sequence, the last one begun; others end with it."""
        if self.why_not_replayed is None:
            try:
                return GraphDecoder(self, self.captured_step(hf))
            except (UnsupportedModelError, CaptureError) as error:
                self._fall_back(error)
        return self._host.decoder(hf)

    def _fall_back(self, error: Exception) -> None:
        """Leave steps to the host, or raise why they cannot be captured.

        For good, but under another policy if this one is why.
        """
        if not self._falls_back:
            raise error
        self.why_not_replayed = reason_of(error)
        if not isinstance(error, PolicyError):
            self._why_never = self.why_not_replayed

    def captured_step(self, hf: nn.Module) -> CapturedStep:
        """Return the step of the present slots, captured when it is first replayed."""
        self.check_open()
        if self._captured is None:
            with torch.inference_mode(False):  # it outlives the caller's mode
                served = ServedStep(
                    self._store, self._policy, self.plan.is_global, self._top_k, self.device,
                    self._routers, self._host.surrogate_outputs,
                )  # fmt: skip
                self._begin(served)
                self._captured = CapturedStep(
                    hf, served, self._context_tokens, self.capturing, self._compiles
                )
        return self._captured

    def _begin(self, served: ServedStep) -> None:
        """Give a step the present slots and gating."""
        served.begin(self.plan, self._host.cached_experts.slots, self.gating)

    def compile_steps(self) -> None:
        """Compile forwards before they are captured, from the next decoded token on."""
        self._compiles = True
        if self._captured is not None:
            self._captured.compile()

    def has_captured(self, step: CapturedStep) -> bool:
        """Whether a step is that of the present slots."""
        return self._captured is step

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Serve one token's experts on the device, for a step that is rehearsed or captured."""
        self._is_capturing = True
        try:
            yield
        finally:
            self._is_capturing = False

    def lets_replay(self, n_before: int) -> bool:
        """Let the step behind `n_before` tokens be replayed; False where the host must run it.

        It must where something is observed or served from elsewhere, and where the step cannot be
        captured, or not yet.

        Raises:
            CaptureError: it cannot, and the host is not to run it instead.
        """
        if self._is_eager or self._captured is None or self.why_not_replayed is not None:
            return False
        if not self._captured.can_be_replayed(n_before):
            return False
        if not self._is_device_owner:
            self._captured.served.tables.take_over(self._host.cached_experts.state)
            self._is_device_owner = True
        try:
            self._captured.capture(n_before)
        except CaptureError as error:
            self._fall_back(error)
            return False
        return True

    def count_replay(self) -> None:
        """Count a step that was replayed."""
        self._n_steps += 1

    def run_layer(self, layer: int, *arguments: Any) -> torch.Tensor:
        """Return the summed outputs [T, D] of a layer's experts, see `ExpertsExecutor`."""
        if self._is_capturing and self._captured is not None:
            return self._captured.served.run_layer(layer, *arguments)
        if self._is_device_owner and self._captured is not None:
            self._host.cached_experts.adopt(self._captured.served.tables.state())
            self._is_device_owner = False
        return self._host.run_layer(layer, *arguments)

    @property
    def callbacks(self) -> Mapping[HookPoint, Callback]:
        """What the host wants to be shown, where it runs the steps."""

        def shown(callback: Callback, *arguments: Any) -> None:
            if not self._is_capturing:
                callback(*arguments)

        return {point: partial(shown, call) for point, call in self._host.callbacks.items()}

    @property
    def traffic(self) -> Traffic:
        """Counters since the slots were made, of prompts and of replayed steps together."""
        passed = self._host.traffic
        if self._captured is None or not self._n_steps:
            return passed
        hits, misses, skipped = self._captured.served.tables.counts
        nothing = np.zeros_like(hits)
        return passed + Traffic(
            hits=hits,
            misses=misses,
            n_steps=self._n_steps,
            bytes_moved=int((misses * self._store.expert_bytes[:, 0]).sum()),
            kept=int(hits.sum() + misses.sum()),
            skipped=int(skipped.sum()),
            prefetch_used=nothing,
            prefetch_wasted=nothing,
        )

    @property
    def is_closed(self) -> bool:
        """Whether everything was given up."""
        return self._host.is_closed

    @property
    def plan(self) -> CachePlan:
        """The slots in use."""
        return self._host.plan

    @property
    def gating(self) -> GatingTable | None:
        """The gating in force."""
        return self._host.gating

    @property
    def surrogates(self) -> Surrogates | None:
        """What is computed in a skipped expert's place."""
        return self._host.surrogates

    @property
    def skipping(self) -> str:
        """Identify what is skipped."""
        return self._host.skipping

    def reading_store(self) -> AbstractContextManager[None]:
        """Take experts straight from the store; the slots and their counters stay as they are."""
        return self._eagerly(self._host.reading_store())

    def unconfigured(self) -> AbstractContextManager[None]:
        """Run everything straight from the store, and count and show none."""
        return self._eagerly(self._host.unconfigured())

    def gated_by(self, table: GatingTable | None) -> AbstractContextManager[None]:
        """Skip by another table for a while."""
        return self._eagerly(self._host.gated_by(table))

    def observing(self, callbacks: Mapping[HookPoint, Callback]) -> AbstractContextManager[None]:
        """Call back at the hook points that lie inside a layer's experts, see `OF_EXPERTS`."""
        return self._eagerly(self._host.observing(callbacks))

    def check_open(self) -> None:
        """Raise RuntimeError if it was closed."""
        self._host.check_open()

    def close(self) -> None:
        """Give up the graph, the slots and the store: nothing runs afterwards."""
        self._forget_step()
        self._host.close()

    @contextmanager
    def _eagerly(self, context: AbstractContextManager[None]) -> Iterator[None]:
        """Run steps layer by layer within a context of the host-driven executor."""
        before, self._is_eager = self._is_eager, True
        try:
            with context:
                yield
        finally:
            self._is_eager = before

    def _forget_step(self, goes_on: CapturedStep | None = None) -> None:
        """Forget the captured step, and free what it keeps unless it goes on in other slots."""
        if self._captured is not None and self._captured is not goes_on:
            self._captured.end()
        self._captured = None
        self._is_device_owner = False
        self._n_steps = 0
