"""A recording's candidates of what later layers need, as a prefetch table follows them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.prefetch.candidates import kept_candidates, likely_needed
from adapmoe_lab.records import GatingTable, PrefetchTable, RecordError, RoutingTrace
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.routing import Prediction


@dataclass(frozen=True, eq=False)
class Candidates:
    """What J predictors predicted of every step and layer.

    Attributes:
        hook_points: int64 [J], when each is queried, a `HookPoint`.
        distances: int64 [J], from how many layers before; 0 for before the pass begins.
        experts: int16 [J, N, L, C], the candidates of each layer, likeliest first, -1 for none.
        probability: float64 [J, N or 1, L, C], that it is right.
    """

    hook_points: NDArray[np.int64]
    distances: NDArray[np.int64]
    experts: NDArray[np.int16]
    probability: NDArray[np.float64]


NO_CANDIDATES = Candidates(
    np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 0, 0, 0), np.int16),
    np.zeros((0, 1, 0, 0)),
)  # fmt: skip


def step_bounds(trace: RoutingTrace) -> NDArray[np.int64]:
    """Return the first token of every step of a trace, and T, int64 [N+1]."""
    ids = trace.step_ids
    return np.flatnonzero(np.diff(ids, prepend=ids[0] - 1, append=ids[-1] + 1))


def recorded_prediction(trace: RoutingTrace, predictor: str, distance: int) -> Prediction:
    """Return what a predictor predicted at a distance.

    Raises:
        RecordError: the trace has no such predictions; the text says which it has.
    """
    try:
        return trace.predictions[predictor][distance]
    except KeyError:
        held = [f"{name} at {list(by)}" for name, by in trace.predictions.items()]
        raise RecordError(
            f"The trace holds no predictions of {predictor!r} at distance {distance}; it holds "
            f"{', '.join(held) or 'none'}. Record it again with that predictor; those that are "
            "fitted need profile(..., predictors=fit_predictors(...))."
        ) from None


def recorded_candidates(
    trace: RoutingTrace, table: PrefetchTable | None, gating: GatingTable | None = None
) -> Candidates:
    """Return what a trace's predictors predicted, as far as a table follows them.

    Args:
        trace: recorded routing, with predictions.
        table: which predictors to follow, at which distances; None for none.
        gating: what will skip experts: candidates that it would skip are left out.

    Raises:
        RecordError: the trace has no predictions of one of them.
    """
    if table is None:
        return NO_CANDIDATES
    bounds = step_bounds(trace)
    by_source = [_predicted_by(trace, source, bounds, gating) for source in table.sources]
    width = max(experts.shape[2] for experts, _ in by_source)
    n_varying = max(len(probability) for _, probability in by_source)
    shape = (len(by_source), len(bounds) - 1, trace.spec.n_layers, width)
    experts = np.full(shape, -1, dtype=np.int16)
    probability = np.zeros((shape[0], n_varying, *shape[2:]))
    for j, (predicted, chance) in enumerate(by_source):
        experts[j, :, :, : predicted.shape[2]] = predicted
        probability[j, :, :, : chance.shape[2]] = chance
    return Candidates(
        np.array([source.hook_point for source in table.sources]),
        np.array([source.distance for source in table.sources]),
        experts,
        probability,
    )


def _predicted_by(trace, source, bounds, gating):
    """Return one predictor's experts [N, L, C] and their probability [N or 1, L, C]."""
    predicted = recorded_prediction(trace, source.predictor, source.distance)
    width = min(predicted.experts.shape[2], source.probability.shape[1])
    experts, scores = predicted.experts[:, :, :width], predicted.scores[:, :, :width]
    by_rank = source.probability[:, :width]
    if gating is not None:
        keep = [
            kept_candidates(experts[:, layer], scores[:, layer], gating, layer)
            for layer in range(trace.spec.n_layers)
        ]
        experts = np.where(np.stack(keep, axis=1), experts, np.int16(-1))
    n_tokens = np.diff(bounds)
    if (n_tokens == 1).all():
        return experts, by_rank[None]
    return _together(experts, by_rank, bounds, source.hook_point == HookPoint.LAST_HIDDEN)


def _together(experts, by_rank, bounds, one_token_only):
    """Return experts and probability for steps of several tokens, [N, L, E or C] each."""
    n_layers = experts.shape[1]
    max_set_size = max(experts.shape[2], int(experts.max()) + 1)
    shape = (len(bounds) - 1, n_layers, max_set_size)
    predicted, probability = np.full(shape, -1, dtype=np.int16), np.zeros(shape)
    for step, (first, end) in enumerate(pairwise(bounds.tolist())):
        if one_token_only and end - first > 1:
            continue
        for layer in range(n_layers):
            named, chance = likely_needed(experts[first:end, layer], by_rank[layer])
            predicted[step, layer, : len(named)] = named
            probability[step, layer, : len(named)] = chance
    return predicted, probability
