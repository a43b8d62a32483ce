"""What to fetch ahead: which candidates are worth the link's idle time.

An expert is fetched ahead into a buffer beside the cache, so that a wrong prediction evicts nothing
and residency is the same with and without prefetch. It crosses the link in chunks, each begun only
while no demand waits; what is not begun when its layer is reached was never fetched, and a wrong
prediction delays a demand by one chunk at most.

The arithmetic here is of plain numbers: what runs a model calls it as it stands, simulation
compiles it, so that both decide alike.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.gating.keep import keep_by_cuts
from adapmoe_lab.records import GatingTable
from adapmoe_lab.records.step_costs import N_CHUNKS


def needed_at(
    ready_at: float, distance: int, dense_layer_s: float, layer_experts_s: float
) -> float:
    """Return when a layer is expected to ask for its experts, if nothing stalls before it.

    Args:
        ready_at: when the present layer will be done.
        distance: how many layers further the layer is.
        dense_layer_s: what a layer takes before it asks.
        layer_experts_s: what the experts of a layer take.
    """
    return ready_at + distance * dense_layer_s + (distance - 1) * layer_experts_s


def expected_gain_s(
    probability: float, begins_at: float, needed_at_s: float, load_s: float, chunk_s: float
) -> float:
    """Return the seconds a prefetch is expected to save; one that is not worth it gives 0 or less.

    A right prediction saves as much of the load as its chunks carry until the expert is asked for.
    A wrong one that is still on its way then costs the chunk that is under way.

    Args:
        probability: that the expert will be needed.
        begins_at: when the link can begin.
        needed_at_s: when its layer will ask.
        load_s: seconds of a load.
        chunk_s: seconds of each chunk of the same expert, which may together take longer.
    """
    idle_s, ahead_s = needed_at_s - begins_at, N_CHUNKS * chunk_s
    if idle_s <= 0:
        return 0.0
    if idle_s >= ahead_s:
        return probability * load_s
    return probability * load_s * idle_s / ahead_s - (1 - probability) * chunk_s


def likely_needed(
    experts: NDArray[np.integer],
    probability: NDArray[np.float64],
    scores: NDArray[np.floating] | None = None,
    gating: tuple[GatingTable, int] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the experts that a step's tokens will probably need, and how probably.

    The candidates of one token stay in their order; those of several are taken as independent and
    ordered by probability, ties to the lowest id.

    Args:
        experts: candidates [T, C] of every token, likeliest first, -1 for none.
        probability: [C], that a prediction of each rank is right.
        scores: predicted router scores [T, C] of the candidates; needed with gating.
        gating: what will skip experts, and the layer: candidates that it would skip are left out.
    """
    if gating is not None and scores is not None:
        experts = np.where(kept_candidates(experts, scores, *gating), experts, -1)
    if len(experts) == 1:
        is_candidate = experts[0] >= 0
        return experts[0][is_candidate].astype(np.int64), probability[is_candidate]
    unneeded: dict[int, float] = {}
    for token in experts.tolist():
        for expert, p in zip(token, probability.tolist(), strict=True):
            if expert >= 0:
                unneeded[expert] = unneeded.get(expert, 1.0) * (1 - p)
    ordered = sorted(unneeded, key=lambda expert: (unneeded[expert], expert))
    return np.array(ordered, dtype=np.int64), np.array([1 - unneeded[e] for e in ordered])


def kept_candidates(
    experts: NDArray[np.integer], scores: NDArray[np.floating], table: GatingTable, layer: int
) -> NDArray[np.bool_]:
    """Return which candidates [T, C] a gating table would keep by their predicted scores.

    Candidates beyond the router's K are left out. Scores are taken in the precision a trace keeps
    them in.
    """
    top_k = table.top_k
    is_candidate = experts >= 0
    weights = scores[:, :top_k].astype(np.float16).astype(np.float32)
    weights[~is_candidate.any(axis=1)] = 1  # of nothing, anything may be kept
    keep = np.zeros(experts.shape, dtype=np.bool_)
    keep[:, :top_k] = keep_by_cuts(weights, table.cuts[layer], table.quantity)
    return keep & is_candidate
