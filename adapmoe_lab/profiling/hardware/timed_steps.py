"""Decode steps, timed in every way that tells what one of their parts takes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch

from adapmoe_lab.engine.generation.tokens import generate_tokens
from adapmoe_lab.engine.host_driven.executor import HostDrivenExecutor
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.observing import observing
from adapmoe_lab.engine.prefetch.predictors import MAX_DISTANCE
from adapmoe_lab.engine.prefetch.prefetcher import Prefetcher
from adapmoe_lab.engine.resident_layer import PROMPT_TOKENS
from adapmoe_lab.profiling.hardware.solved_costs import TimedStep
from adapmoe_lab.records import OFF, CachePlan, GatingTable, PrefetchSource, PrefetchTable
from adapmoe_lab.records.hook_points import HookPoint

STRIDE = 5
"""Variants by which the next decode begins further on: few steps cover all, since it divides no
number of variants that there can be."""


class UntimedExecutorError(ValueError):
    """The parts of a step cannot be timed on the executor of a model."""


@dataclass(frozen=True, eq=False)
class _Variant:
    """How a decode step is run: under which gate, and which predictors are queried in vain."""

    gating: GatingTable | None = None
    querying: Prefetcher | None = None


def _variants(model: LabModel) -> list[_Variant]:
    """Return every way to run a step: as it is, keeping all, keeping one; querying or not.

    In a gated step the candidates are put to the gate too. The engine is left as it was loaded.
    """
    engine, spec, variants = host_driven(model), model.spec, []
    keeps_all, keeps_one = (
        GatingTable.per_layer(np.full(spec.n_layers, cut), spec.top_k) for cut in (OFF, 0.0)
    )
    engine.configure(None, model.memory.slots)
    tables, predictors = _query_tables(model), model.predictors()
    plain, judging = (
        [None, *(engine.idle_prefetcher(table, predictors, judge) for table in tables)]
        for judge in (None, keeps_all)
    )
    for gating, queried in ((None, plain), (keeps_all, judging), (keeps_one, judging)):
        variants += [_Variant(gating, querying) for querying in queried]
    return variants


def _query_tables(model: LabModel) -> list[PrefetchTable]:
    """Return what to query: the next router, routers at every distance, and the next layer's norm.

    Only what can be had of the model is in it; nothing where routers read another input.
    """
    spec = model.spec
    if not all(layer.router.reads_experts_input for layer in model.layers) or spec.n_layers < 2:
        return []
    never = np.zeros((spec.n_layers, spec.top_k))
    routers = [
        PrefetchSource("next_router", distance, never)
        for distance in range(1, min(MAX_DISTANCE + 1, spec.n_layers))
    ]
    tables = [routers[:1], routers] if len(routers) > 1 else [routers]
    if any(predictor.name == "own_norm" for predictor in model.predictors()):
        tables.append([PrefetchSource("own_norm", 1, never)])
    return [PrefetchTable(sources, buffer_slots=1) for sources in tables]


def unthrottled_steps(model: LabModel, n_steps: int, first: int) -> list[TimedStep]:
    """Decode over a link without delay, its steps in interleaved variants.

    The number `first` says which variant comes first.
    """
    engine, variants = host_driven(model), _variants(model)
    first = first * STRIDE % len(variants)
    outputs = observing(model, {HookPoint.LAYER_OUTPUT: engine.end_layer})
    with model.link.without_link_delay(), outputs:
        return _steps(model, n_steps, variants[first:] + variants[:first])


def throttled_steps(model: LabModel, n_steps: int) -> list[TimedStep]:
    """Decode over a throttled link; the prompt passes unthrottled."""
    with ExitStack() as unthrottled:
        unthrottled.enter_context(model.link.without_link_delay())
        model.engine.configure(None, with_slots(model, model.spec.n_experts // 2))
        return _steps(model, n_steps, [_Variant()], after_prompt=unthrottled.close)


def _steps(
    model: LabModel,
    n_steps: int,
    variants: list[_Variant],
    after_prompt: Callable[[], None] = lambda: None,
) -> list[TimedStep]:
    """Decode in a cache that is empty at first; return the steps after the prompt."""
    engine, steps = host_driven(model), []
    before, start, variant = engine.traffic, 0.0, _Variant()
    tokens = generate_tokens(model.decoder(), torch.arange(PROMPT_TOKENS), n_steps + 1)
    for step, _ in enumerate(tokens):
        seconds, passed = engine.clock.now() - start, engine.traffic - before
        if step > 0:
            querying = variant.querying
            queries = _n_queries(model, querying.table) if querying else (0, 0, 0)
            counted = passed.kept, variant.gating is not None, *queries, passed.hits, passed.misses
            steps.append(TimedStep(seconds, *counted))
        else:
            after_prompt()
        variant = variants[step % len(variants)]
        engine.switch_to(variant.gating, variant.querying)
        before, start = engine.traffic, engine.clock.now()
    return steps


def host_driven(model: LabModel) -> HostDrivenExecutor:
    """Return the executor of a model, whose parts can be timed one by one.

    Raises:
        UntimedExecutorError: it runs by another one.
    """
    if not isinstance(model.engine, HostDrivenExecutor):
        raise UntimedExecutorError(
            "The steps of this model are driven by the host, though it was loaded for captured "
            f"graphs: {model.engine.why_not_replayed}. Load it again with executor='host' to probe."
        )
    return model.engine


def _n_queries(model: LabModel, table: PrefetchTable) -> tuple[int, int, int]:
    """Return a step's queries by a table, its hook points, and those that are layers' outputs."""
    targets = [model.spec.n_layers - source.distance for source in table.sources]
    n_points = max(targets)  # all sources of a table predict at the same hook points here
    return sum(targets), n_points, n_points * table.predicts_at(HookPoint.LAYER_OUTPUT)


def with_slots(model: LabModel, most: int) -> CachePlan:
    """Return so many slots for every layer, fewer where the model was loaded with fewer."""
    slots = model.memory.slots
    return replace(slots, slots=np.minimum(slots.slots, most))
