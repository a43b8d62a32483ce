"""Which predictors to prefetch by: how often they are right, and what following them brings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.records import (
    CachePlan,
    GatingTable,
    HardwareProfile,
    MoESpec,
    Predictors,
    PrefetchSource,
    PrefetchTable,
    RoutingTrace,
    TunedConfig,
)
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.prefetch import FITTED, HOOK_POINTS
from adapmoe_lab.simulation.replay.recorded_candidates import (
    Candidates,
    recorded_candidates,
    recorded_prediction,
)
from adapmoe_lab.simulation.replay.replay import replay
from adapmoe_lab.simulation.simulate import Simulation, simulate
from adapmoe_lab.simulation.statistics.predictability import are_needed

SourceKey = tuple[str, int]
"""A predictor and the distance over which it predicts."""

NO_SOURCES = "none"
"""The choice that prefetches nothing."""

MIN_CANDIDATES = 20
"""Candidates of one rank and layer that a probability is learnt from; of fewer, nothing is."""


def plan_prefetch(
    trace: RoutingTrace,
    *,
    gating: GatingTable | None = None,
    plan: CachePlan | None = None,
    eviction: str = "lru",
    sources: Sequence[SourceKey] | None = None,
    n_slots: int | None = None,
    fitted: Predictors | None = None,
) -> PrefetchTable:
    """Return a prefetch table with the probabilities that a trace shows.

    What counts is how often a prediction is right of an expert that is not resident: the cache
    keeps what is needed often, so that absent experts are predicted wrong more often than others.

    Args:
        trace: recorded routing, with the predictions of the sources.
        gating: what will skip experts.
        plan: the slots; room for every expert if None, and then nothing is ever absent.
        eviction: who leaves them.
        sources: predictors and distances; what was recorded, the fitted before others, if None.
        n_slots: experts on their way or waiting at once; see `buffer_slots` if None.
        fitted: fitted predictors that some of the sources are of.

    Raises:
        RecordError: the trace lacks predictions, or a source is fitted and `fitted` is missing.
    """
    spec, steps = trace.spec, trace.as_decode()
    sources = recorded_sources(trace, fitted) if sources is None else sources
    room = n_slots if n_slots is not None else buffer_slots(spec)
    fitted = fitted if any(name in FITTED for name, _ in sources) else None
    unsure = [
        PrefetchSource(
            name,
            distance,
            np.ones((spec.n_layers, recorded_prediction(trace, name, distance).n_candidates)),
        )
        for name, distance in sources
    ]
    table = PrefetchTable(unsure, room, fitted)
    keep = kept_experts(steps, gating)
    candidates = recorded_candidates(steps, table, gating)
    absent = replay(steps, keep, plan, eviction, candidates).absent
    shares = _right_shares(steps, keep, candidates, absent)
    sure = [
        replace(source, probability=shares[j, :, : source.probability.shape[1]])
        for j, source in enumerate(table.sources)
    ]
    return replace(table, sources=sure)


def buffer_slots(spec: MoESpec) -> int:
    """Return room for the experts that two layers choose for a token."""
    return min(2 * spec.top_k, spec.n_experts)


def recorded_sources(trace: RoutingTrace, fitted: Predictors | None = None) -> list[SourceKey]:
    """Return one predictor for each hook point and distance that a trace has predictions of.

    Of several the fitted one is taken, if `fitted` is given.
    """
    chosen: dict[tuple[HookPoint, int], SourceKey] = {}
    for name in sorted(trace.predictions, key=lambda name: name in FITTED):
        if name in HOOK_POINTS and (fitted is not None or name not in FITTED):
            for distance in trace.predictions[name]:
                chosen[HOOK_POINTS[name], distance] = (name, distance)
    return list(chosen.values())


def best_prefetch(
    trace: RoutingTrace,
    config: TunedConfig,
    hardware: HardwareProfile,
    *,
    fitted: Predictors | None = None,
) -> tuple[PrefetchTable | None, dict[str, float]]:
    """Return the prefetch of the least predicted time, None if that is none, and all times.

    Tried is what `prefetch_choices` returns, and nothing where steps are replayed: these prefetch
    nothing.

    Args:
        trace: recorded routing, with predictions.
        config: gating, plan and eviction; its own prefetch is left out.
        hardware: measured times.
        fitted: fitted predictors whose predictions the trace has.

    Returns:
        The table, and predicted milliseconds per token by the name of the choice.
    """
    plain = replace(config, prefetch=None)
    tables: dict[str, PrefetchTable | None] = {NO_SOURCES: None}
    if not hardware.is_of_replays:
        tables = prefetch_choices(trace, plain, fitted)
    times = {
        name: ms_per_token(simulate(trace, replace(plain, prefetch=table), hardware))
        for name, table in tables.items()
    }
    best = min(times, key=lambda name: times[name])
    return tables[best], times


def prefetch_choices(
    trace: RoutingTrace, config: TunedConfig, fitted: Predictors | None = None
) -> dict[str, PrefetchTable | None]:
    """Return tables of no sources, and of ever more, by the name of the choice.

    First the nearest distance, then all of them, those that predict after a layer, and those
    that predict the first layer.

    Args:
        trace: recorded routing, with predictions.
        config: gating, plan and eviction; its own prefetch plays no part.
        fitted: fitted predictors whose predictions the trace has.
    """
    recorded = recorded_sources(trace, fitted)
    tables: dict[str, PrefetchTable | None] = {NO_SOURCES: None}
    for name, is_meant in _CHOICES.items():
        sources = [source for source in recorded if is_meant(*source)]
        if sources and all(len(t.sources) < len(sources) for t in tables.values() if t):
            tables[name] = plan_prefetch(
                trace,
                gating=config.gating,
                plan=config.plan,
                eviction=config.eviction,
                sources=sources,
                fitted=fitted,
            )
    return tables


_CHOICES = {
    "the next layer": lambda name, distance: distance == 1 and _is_ahead(name),
    "all distances": lambda name, distance: _is_ahead(name),
    "all distances, and again after the layer": lambda name, distance: distance > 0,
    "all": lambda name, distance: True,
}


def _is_ahead(name: str) -> bool:
    return HOOK_POINTS[name] == HookPoint.EXPERTS_INPUT


def ms_per_token(simulation: Simulation) -> float:
    """Return the predicted milliseconds per token of a simulation on known hardware."""
    assert simulation.ms_per_token is not None, "there is hardware"  # noqa: S101
    return simulation.ms_per_token


def _right_shares(
    trace: RoutingTrace, keep: NDArray[np.bool_], candidates: Candidates, absent: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return the share [J, L, C] of candidates of absent experts that are needed."""
    is_right = np.stack([are_needed(trace, keep, experts) for experts in candidates.experts])
    n_candidates = absent.sum(axis=1)
    shares = (is_right & absent).sum(axis=1) / np.maximum(1, n_candidates)
    return np.where(n_candidates >= MIN_CANDIDATES, shares, 0.0)
