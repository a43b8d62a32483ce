"""What the controls of the workbench say, and what follows from it. No widgets, no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.policies.gating.registry import RULES, largest_skipped_fraction
from adapmoe_lab.records import (
    OFF,
    GatingTable,
    HardwareProfile,
    PrefetchTable,
    RoutingTrace,
    SensitivityProfile,
    Surrogates,
    TunedConfig,
)
from adapmoe_lab.simulation.search.prefetch_search import plan_prefetch
from adapmoe_lab.simulation.simulate import Simulation, simulate
from adapmoe_lab.tuning.tune import check_skippable, prediction_summary

PREDICTOR = "next_router"
N_QUICK_TOKENS = 192
N_FULL_TOKENS = 3000
N_TRADEOFF = 6
SUGGESTED_LOSS_NATS = 0.01
"""One percent of perplexity."""


@dataclass(frozen=True)
class Cache:
    """What is on the device before it is needed.

    Attributes:
        slots_per_layer: experts each layer keeps.
        layers_ahead: from how many layers before each layer's experts are prefetched; 0 for
            only when they are needed.
    """

    slots_per_layer: int
    layers_ahead: int = 0


@dataclass(frozen=True, eq=False)
class Candidate:
    """One setting of the controls.

    Attributes:
        cuts: float64 [L], cut on the share per layer; above one skips nothing there.
        cache: what is kept, and prefetched.
        chosen_by: the rule that gave the cuts, or `by hand`.
    """

    cuts: NDArray[np.float64]
    cache: Cache
    chosen_by: str

    @property
    def key(self) -> tuple[bytes, Cache]:
        """What distinguishes one setting from another, however it was reached."""
        return np.minimum(self.cuts, OFF).astype(np.float32).tobytes(), self.cache


class Session:
    """Everything a candidate is judged by: one trace, one sensitivity, one machine."""

    def __init__(
        self,
        trace: RoutingTrace,
        sensitivity: SensitivityProfile,
        hardware: HardwareProfile,
        compensation: Surrogates | None = None,
    ) -> None:
        """Bind what was measured; the first `N_FULL_TOKENS` tokens of the trace are replayed.

        Raises:
            ValueError: the router chooses a single expert, or the trace was recorded while experts
                were skipped.
        """
        check_skippable(trace.spec)
        trace.check_ungated()
        self.trace = trace.first(N_FULL_TOKENS)
        self.sensitivity = sensitivity
        self.hardware = hardware
        self.compensation = compensation
        self._quick = trace.first(N_QUICK_TOKENS)
        self.rules = {name: rule(self.trace, sensitivity) for name, rule in RULES.items()}
        self._baselines: dict[Cache, Simulation] = {}
        self._tradeoffs: dict[tuple[str, Cache], list[Simulation]] = {}
        self._prefetch: dict[Cache, PrefetchTable | None] = {}

    @property
    def max_layers_ahead(self) -> int:
        """From how many layers before experts can be prefetched, by what was recorded."""
        return max(self.trace.predictions.get(PREDICTOR, {}), default=0)

    def suggestion(self, method: str, cache: Cache) -> Candidate:
        """Return the candidate that skips most within `SUGGESTED_LOSS_NATS` of predicted loss."""
        fraction = largest_skipped_fraction(
            self.rules[method], self.sensitivity, self.trace.spec.top_k, SUGGESTED_LOSS_NATS
        )
        return self.candidate(method, fraction, cache)

    def candidate(self, method: str, skipped_fraction: float, cache: Cache) -> Candidate:
        """Return the candidate whose cuts a rule chooses for a skipped fraction."""
        if skipped_fraction <= 0:
            cuts = np.full(self.trace.spec.n_layers, OFF)
        else:
            table = self.rules[method].table(skipped_fraction)
            cuts = table.cuts[:, 0].astype(np.float64)
        return Candidate(cuts, cache, method)

    def config(self, candidate: Candidate) -> TunedConfig:
        """Return the config that runs a candidate."""
        spec = self.trace.spec
        skips = bool((candidate.cuts <= 1).any())
        return TunedConfig(
            model=TunedConfig.model_identity(spec),
            gating=GatingTable.per_layer(candidate.cuts, spec.top_k) if skips else None,
            compensation=self.compensation,
            plan=slots_plan(spec, candidate.cache.slots_per_layer),
            prefetch=self._prefetch_table(candidate.cache),
            precision=spec.precision,
            hardware=self.hardware,
        )

    def _prefetch_table(self, cache: Cache) -> PrefetchTable | None:
        """Return a cache's prefetch table, learnt once for each with nothing skipped."""
        if not cache.layers_ahead:
            return None
        if cache not in self._prefetch:
            plan = slots_plan(self.trace.spec, cache.slots_per_layer)
            sources = [(PREDICTOR, distance) for distance in range(1, cache.layers_ahead + 1)]
            self._prefetch[cache] = plan_prefetch(self.trace, plan=plan, sources=sources)
        return self._prefetch[cache]

    def skipped_fraction(self, candidate: Candidate) -> float:
        """Return the share of expert activations a candidate skips on the trace."""
        return float(1 - kept_experts(self.trace, self.config(candidate).gating).mean())

    def predict(self, candidate: Candidate, *, quick: bool = False) -> Simulation:
        """Return what a candidate is predicted to do; `quick` replays the first few tokens only."""
        trace = self._quick if quick else self.trace
        return simulate(trace, self.config(candidate), self.hardware, sensitivity=self.sensitivity)

    def without_skipping(self, cache: Cache) -> Simulation:
        """Return what a cache does when nothing is skipped; computed once per cache."""
        if cache not in self._baselines:
            candidate = self.candidate("uniform", 0.0, cache)
            self._baselines[cache] = self.predict(candidate)
        return self._baselines[cache]

    def tradeoff(self, method: str, cache: Cache) -> list[Simulation]:
        """Return predictions of one rule over evenly spaced skipped fractions, none to most.

        Computed once per rule and cache.
        """
        key = method, cache
        if key not in self._tradeoffs:
            fractions = np.linspace(0, self.trace.spec.max_skipped_fraction, N_TRADEOFF)
            candidates = [self.candidate(method, float(f), cache) for f in fractions]
            self._tradeoffs[key] = [self.predict(candidate) for candidate in candidates]
        return self._tradeoffs[key]

    def export(self, candidate: Candidate, measured: Mapping[str, Any]) -> TunedConfig:
        """Return the config of a candidate with its predicted and measured evidence.

        It counts as verified once its loss was measured.
        """
        return self.config(candidate).with_evidence(
            method=candidate.chosen_by,
            trace=self.trace.fingerprint(),
            verified="loss" in measured,
            predicted=prediction_summary(self.predict(candidate)),
            predicted_without_skipping=prediction_summary(self.without_skipping(candidate.cache)),
            measured=dict(measured) or None,
        )
