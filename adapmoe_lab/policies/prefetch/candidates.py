"""Which experts a step's tokens will probably need, by what is predicted for each of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.gating.keep import keep_by_cuts
from adapmoe_lab.records import GatingTable


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
