"""Decode steps timed by variants, and what their parts take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.generation import generate_tokens
from adapmoe_lab.engine.host_driven.executor import HostDrivenExecutor
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.observing import observing
from adapmoe_lab.engine.prefetch.predictors import MAX_DISTANCE
from adapmoe_lab.engine.prefetch.prefetcher import Prefetcher
from adapmoe_lab.engine.resident_layer import PROMPT_TOKENS
from adapmoe_lab.records import OFF, CachePlan, GatingTable, PrefetchSource, PrefetchTable
from adapmoe_lab.records.hook_points import HookPoint

STRIDE = 5
"""Turns that the next decode begins further on: few steps cover all, since it divides no number of
variants that there can be."""
N_SCALED = 4
"""Rounds of telling slow decodes from expensive parts, after which both have settled."""
N_REWEIGHTED = 30
"""Rounds of reweighting after which the least absolute errors have settled."""
SMALL_ERROR, TINY_S = 0.01, 1e-9
"""Errors count as alike below this share of their median, and below these seconds."""


@dataclass(frozen=True, eq=False)
class TimedStep:
    """One timed decode step.

    Attributes:
        seconds: what it took.
        n_run: experts run, of all layers.
        is_gated: whether a gate was asked.
        n_candidates: how often a predictor was asked about a layer.
        n_queries: at how many hook_points of layers any was.
        n_output_queries: how many of these were outputs of layers.
        hits: experts that were there, by layer [L].
        misses: experts that were loaded, by layer [L].
    """

    seconds: float
    n_run: int
    is_gated: bool
    n_candidates: int
    n_queries: int
    n_output_queries: int
    hits: NDArray[np.int64]
    misses: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Variant:
    """How a decode step is run: under which gate, and with whom asked what is never followed."""

    gating: GatingTable | None = None
    querying: Prefetcher | None = None


def _variants(model: LabModel) -> list[_Variant]:
    """Return every way to run a step: as it is, keeping all, keeping one; querying or not.

    In a gated step the answers are put to a gate too. The engine is left as the model was loaded.
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
    for gating, asked in ((None, plain), (keeps_all, judging), (keeps_one, judging)):
        variants += [_Variant(gating, querying) for querying in asked]
    return variants


def _query_tables(model: LabModel) -> list[PrefetchTable]:
    """Return whom to ask: the next router, the same at every distance, and the next layer's norm.

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
    by_turns = [routers[:1], routers] if len(routers) > 1 else [routers]
    if any(predictor.name == "own_norm" for predictor in model.predictors()):
        by_turns.append([PrefetchSource("own_norm", 1, never)])
    return [PrefetchTable(sources, buffer_slots=1) for sources in by_turns]


def unthrottled_steps(model: LabModel, n_steps: int, first: int) -> list[TimedStep]:
    """Decode over a link that holds nothing, every way to run a step by variants.

    With each number, `first` begins with another way.
    """
    engine, variants = host_driven(model), _variants(model)
    first = first * STRIDE % len(variants)
    outputs = observing(model, {HookPoint.LAYER_OUTPUT: engine.end_layer})
    with model.link.without_link_delay(), outputs:
        return _steps(model, n_steps, variants[first:] + variants[:first])


def throttled_steps(model: LabModel, n_steps: int) -> list[TimedStep]:
    """Decode over a link that holds its copies; the prompt passes unthrottled."""
    with ExitStack() as unthrottled:
        unthrottled.enter_context(model.link.without_link_delay())
        model.engine.configure(None, _half(model))
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
        ValueError: it runs by another one.
    """
    if not isinstance(model.engine, HostDrivenExecutor):
        raise ValueError(
            f"The parts of a step are timed with executor='host'; this model was loaded with "
            f"executor={model.engine.capabilities.name!r}. Load it again without it to probe."
        )
    return model.engine


def _n_queries(model: LabModel, asked: PrefetchTable) -> tuple[int, int, int]:
    """Return how many predictions a table takes in a step, at how many hook points, and outputs."""
    targets = [model.spec.n_layers - source.distance for source in asked.sources]
    n_queries = max(targets)  # all sources of a table speak at the same hook points here
    return sum(targets), n_queries, n_queries * asked.predicts_at(HookPoint.LAYER_OUTPUT)


def _half(model: LabModel) -> CachePlan:
    """Return room for half of the experts, less where the model was loaded with less."""
    slots = model.memory.slots
    return replace(slots, slots=np.minimum(slots.slots, model.spec.n_experts // 2))


def solved_costs(
    decodes: Sequence[Sequence[TimedStep]], miss_s: float | None, alone_s: float
) -> dict[str, float]:
    """Return the seconds of a step's parts, which leave the least absolute errors.

    Where a whole decode was slower or faster than the others, so are all its parts: what else the
    machine did then is taken out first.

    They are `step`, all outside the experts; `expert`; `gate`, gating every layer; and, if anybody
    was asked, `prediction` and `gated_predict`, one predictor about one layer, `ask`, a hook_point
    at which any is, and `ask_output`, what one at a layer's output takes more. Parts that would be
    negative are left out, those that take most off a step first, and are zero. Where a router
    chooses one expert, that expert takes what it takes alone.
    """
    steps = [step for decode in decodes for step in decode]
    seconds = np.array([step.seconds for step in steps])
    counts = {
        "step": [1 for _ in steps],
        "expert": [step.n_run for step in steps],
        "gate": [step.is_gated for step in steps],
        "predict": [step.n_candidates * (not step.is_gated) for step in steps],
        "gated_predict": [step.n_candidates * step.is_gated for step in steps],
        "predict_overhead": [step.n_queries for step in steps],
        "predict_output_overhead": [step.n_output_queries for step in steps],
        "miss": [step.misses.sum() for step in steps],
    }
    columns = {name: np.array(values, dtype=np.float64) for name, values in counts.items()}
    if miss_s is not None:
        seconds = seconds - columns.pop("miss") * miss_s
    has_choice = bool(np.ptp(columns["expert"]))
    if not has_choice:
        seconds = seconds - columns.pop("expert") * alone_s
    names = [name for name, column in columns.items() if name == "step" or np.ptp(column)]
    table = np.stack([columns[name] for name in names], axis=1)
    lengths = [len(decode) for decode in decodes]
    paces = np.ones(len(decodes))
    for _ in range(N_SCALED):
        solution = _least_absolute_parts(table, seconds / np.repeat(paces, lengths))
        ratios = seconds / np.maximum(table @ solution, TINY_S)
        paces = np.array([np.median(own) for own in np.split(ratios, np.cumsum(lengths)[:-1])])
        paces /= np.median(paces)
    found = dict(zip(names, solution.tolist(), strict=True))
    return found if has_choice else {**found, "expert": alone_s}


def _least_absolute_parts(
    table: NDArray[np.float64], seconds: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return what each column adds, none of it negative; the first is left out last."""
    parts, kept = np.zeros(table.shape[1]), list(range(table.shape[1]))
    while True:
        solution = least_absolute(table[:, kept], seconds)
        worst = int((solution * table[:, kept].max(axis=0)).argmin())
        if solution[worst] >= 0 or worst == 0:
            parts[kept] = np.maximum(0.0, solution)
            return parts
        del kept[worst]


def least_absolute(
    columns: NDArray[np.float64], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the x [P] of the least sum of |columns [N, P] @ x - values [N]|.

    By least squares reweighted again and again: how far off a few values are matters little.
    """
    weights = np.ones(len(values))
    solution = np.zeros(columns.shape[1])
    for _ in range(N_REWEIGHTED):
        root = np.sqrt(weights)
        solution = np.linalg.lstsq(columns * root[:, None], values * root, rcond=None)[0]
        errors = np.abs(columns @ solution - values)
        weights = 1 / np.maximum(errors, max(SMALL_ERROR * float(np.median(errors)), TINY_S))
    return solution
