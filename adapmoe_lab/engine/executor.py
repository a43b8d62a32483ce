"""What runs a model's experts: the protocol that every executor follows, and what each is able to.

An executor serves the experts of one model whose experts function calls `run_layer`, under one
configuration at a time, and decodes token by token. Whoever uses it configures it, runs the model
or a decoder, and reads counters; what it keeps inside is its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from adapmoe_lab.engine.prefetch.predictors import Predictor
from adapmoe_lab.engine.sampling import Sampling
from adapmoe_lab.engine.transfer.clock import Clock
from adapmoe_lab.models.hooks.experts_hook import ExpertsExecutor
from adapmoe_lab.models.hooks.observing import Callback
from adapmoe_lab.records import (
    CachePlan,
    GatingTable,
    PrecisionPlan,
    PrefetchTable,
    Surrogates,
    Traffic,
    TunedConfig,
)
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.step_costs import StepCosts


class TokenSampler(Protocol):
    """Chooses the tokens of one text, one after the other."""

    def choose(self, logits: torch.Tensor) -> int:
        """Return the token that follows, by logits [V]; it belongs to the text from now on."""
        ...


class Decoder(Protocol):
    """One sequence on its way through a model, its keys and values kept.

    After a pass that was interrupted the sequence cannot go on: some layers know of its tokens and
    others do not. Using it then raises RuntimeError.
    """

    @property
    def has_ended(self) -> bool:
        """Whether it cannot go on: a pass was interrupted, or another sequence took its place."""
        ...

    def prefill(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Run a prompt, int64 [T], or more of one; return the logits [V] of what follows it."""
        ...

    def step(self, token: int) -> torch.Tensor:
        """Run one token more; return the logits [V] of what follows it, valid until the next."""
        ...

    def sampler(self, sampling: Sampling, text: torch.Tensor) -> TokenSampler:
        """Return what chooses the tokens that follow a text, int64 [T], by its logits.

        There is one at a time.
        """
        ...


@dataclass(frozen=True)
class Capabilities:
    """What an executor is able to run.

    Attributes:
        name: what `load` calls the executor.
        precisions: precisions that experts may be stored in; None for all.
        evictions: names of eviction policies; None for all.
        has_shared_pool: whether layers may share their slots.
        is_gated: whether a configuration may skip experts.
        has_surrogates: whether surrogates may take a skipped expert's place.
        has_prefetch: whether experts are fetched before they are needed.
    """

    name: str
    precisions: Collection[str] | None = None
    evictions: Collection[str] | None = None
    has_shared_pool: bool = True
    is_gated: bool = True
    has_surrogates: bool = True
    has_prefetch: bool = True

    def check(self, config: TunedConfig, precision: PrecisionPlan) -> None:
        """Refuse a config, on experts that are stored so, by the name of what cannot be run.

        Raises:
            ValueError: the executor cannot run it; the text says what, and which one can.
        """
        others = [name for name in precision.counts if not _allows(self.precisions, name)]
        unable = self._unable(
            config.eviction, config.plan, config.gating, config.compensation, config.prefetch
        )
        self._refuse([*unable, *(f"experts in {name}" for name in others)])

    def check_gated(self) -> None:
        """Refuse work that needs a gating in force.

        Raises:
            ValueError: no configuration may skip experts.
        """
        self._refuse([] if self.is_gated else ["gating"])

    def check_parts(
        self,
        eviction: str,
        plan: CachePlan | None,
        gating: GatingTable | None,
        surrogates: Surrogates | None,
        prefetch: PrefetchTable | None,
    ) -> None:
        """Refuse what `Executor.configure` is given, by the name of what cannot be run.

        Raises:
            ValueError: as `check`.
        """
        self._refuse(self._unable(eviction, plan, gating, surrogates, prefetch))

    def _unable(
        self,
        eviction: str,
        plan: CachePlan | None,
        gating: GatingTable | None,
        surrogates: Surrogates | None,
        prefetch: PrefetchTable | None,
    ) -> list[str]:
        """Return the names of what cannot be run."""
        is_shared = plan is not None and plan.is_global
        is_able = {
            f"eviction {eviction!r}": _allows(self.evictions, eviction),
            "a shared pool of slots": self.has_shared_pool or not is_shared,
            "gating": self.is_gated or gating is None,
            "surrogates": self.has_surrogates or surrogates is None,
            "prefetch": self.has_prefetch or prefetch is None,
        }
        return [name for name, able in is_able.items() if not able]

    def _refuse(self, unable: Sequence[str]) -> None:
        if unable:
            raise ValueError(
                f"executor={self.name!r} does not run {', '.join(unable)}. It runs experts in "
                f"{_listed(self.precisions)} with eviction {_listed(self.evictions)}; load the "
                "model with executor='host', which runs everything."
            )


def _allows(names: Collection[str] | None, name: str) -> bool:
    return names is None or name in names


def _listed(names: Collection[str] | None) -> str:
    return "any" if names is None else ", ".join(names)


class Executor(ExpertsExecutor, Protocol):
    """Runs a model's experts from a store through slots on the device.

    One forward pass at a time; an exception or interrupt at any point leaves it consistent.

    Attributes:
        device: where it computes.
        clock: what its time is read from.
        is_closed: whether everything was given up.
        why_not_replayed: why steps are driven by the host, where a captured graph was asked for;
            None where they are replayed, or nobody asked.
    """

    device: torch.device
    clock: Clock
    is_closed: bool
    why_not_replayed: str | None

    @property
    def capabilities(self) -> Capabilities:
        """What it is able to run."""
        ...

    @property
    def runs_steps_by(self) -> str:
        """What runs a decode step under the present configuration: `"host"` or `"graph"`."""
        ...

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
        """Run under another configuration from now on, with empty slots and counters at zero.

        Args:
            gating: which experts are skipped; None to skip nothing.
            plan: the slots.
            eviction: name of the policy that says who leaves them.
            surrogates: what is computed in a skipped expert's place.
            prefetch: what is fetched before it is needed.
            predictors: at least those that the prefetch table follows.
            step_costs: what the parts of a step are expected to take; None for as before.

        Raises:
            ValueError: it is not able to.
        """
        ...

    def release(self) -> None:
        """Give up all slots, once nothing is on its way into them; experts then only stream."""
        ...

    def decoder(self, hf: nn.Module) -> Decoder:
        """Return what decodes one sequence with the model whose experts this runs.

        A graph-captured executor has one at a time.
        """
        ...

    @property
    def callbacks(self) -> Mapping[HookPoint, Callback]:
        """What it wants to be shown of every forward pass under the present configuration."""
        ...

    @property
    def traffic(self) -> Traffic:
        """Counters since the present configuration."""
        ...

    @property
    def plan(self) -> CachePlan:
        """The slots in use."""
        ...

    @property
    def gating(self) -> GatingTable | None:
        """The gating in force."""
        ...

    @property
    def surrogates(self) -> Surrogates | None:
        """What is computed in a skipped expert's place."""
        ...

    @property
    def skipping(self) -> str:
        """Identify what is skipped and what is computed instead; `UNGATED` if nothing is."""
        ...

    def reading_store(self) -> AbstractContextManager[None]:
        """Take experts straight from the store; the slots and their counters stay as they are."""
        ...

    def unconfigured(self) -> AbstractContextManager[None]:
        """Run everything straight from the store, whatever is configured, and count none of it.

        Nothing is called back at the hook points inside the experts. What is configured and counted
        is as before afterwards.
        """
        ...

    def gated_by(self, table: GatingTable | None) -> AbstractContextManager[None]:
        """Skip by another table for a while; slots and counters go on."""
        ...

    def observing(self, callbacks: Mapping[HookPoint, Callback]) -> AbstractContextManager[None]:
        """Call back at the hook points that lie inside a layer's experts, see `OF_EXPERTS`.

        Entered with no callbacks too, where points outside the experts are observed: what runs
        then must pass through the modules of the model. For `engine.observing` to call.
        """
        ...

    def check_open(self) -> None:
        """Raise RuntimeError if it was closed."""
        ...

    def close(self) -> None:
        """Give up slots, surrogates and the store: nothing runs afterwards."""
        ...
