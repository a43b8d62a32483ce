"""How well predictors predict the experts that are needed, by what was recorded of them.

Token by token, as in decoding: what several tokens of one forward pass need together is not
counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.gating.keep import keep_by_cuts, kept_experts
from adapmoe_lab.records import GatingTable, Prediction, RoutingTrace
from adapmoe_lab.records.standard_error import none_if_unknown
from adapmoe_lab.simulation.replay.recorded_candidates import recorded_prediction
from adapmoe_lab.simulation.statistics.jackknife import jackknife
from adapmoe_lab.simulation.statistics.routing_patterns import expert_use
from adapmoe_lab.simulation.statistics.token_means import means_by_token

Floats = NDArray[np.float64]
FREQUENCY = "frequency"
PREVIOUS_TOKEN = "previous_token"  # noqa: S105 a token of a text
TOKEN_TABLE_ALL = "token_table_all"  # noqa: S105


@dataclass(frozen=True, eq=False)
class Predictability:
    """How well one predictor predicts, with standard errors over sequences.

    Layers that it does not predict are NaN, and the errors of a single sequence.

    Attributes:
        recall: float64 [L], share of the needed experts that were predicted.
        recall_se: float64 [L].
        precision: float64 [L], share of the predicted experts that were needed.
        precision_se: float64 [L].
        mean_recall: over all layers that are predicted, with its standard error; None if not known.
        mean_precision: likewise.
    """

    recall: Floats
    recall_se: Floats
    precision: Floats
    precision_se: Floats
    mean_recall: tuple[float, float | None]
    mean_precision: tuple[float, float | None]


def recall_and_precision(
    trace: RoutingTrace,
    predictor: str,
    distance: int,
    gating: GatingTable | None = None,
    candidates: int | None = None,
) -> Predictability:
    """Compare what a predictor named with what was needed.

    Args:
        trace: recorded routing with predictions.
        predictor: whose.
        distance: how many layers ahead.
        gating: what of the router's choice is needed; all of it if None.
        candidates: experts counted as predicted, the likeliest; if None the router's K, or under
            a gating those of them that it would keep by the predicted scores.

    Raises:
        RecordError: the trace has no such predictions.
        ValueError: they name too few candidates.
    """
    prediction = recorded_prediction(trace, predictor, distance)
    named = _candidates(trace, prediction, gating, candidates)
    is_asked = prediction.experts[:, :, :1] >= 0  # [T, L, 1]
    needed = kept_experts(trace, gating) & is_asked
    counts = [
        np.add.reduceat(per_token.sum(axis=2), trace.sequence_starts, axis=0)  # [S, L]
        for per_token in (are_needed(trace, needed, prediction.experts) & named, needed, named)
    ]
    lengths = np.diff([*trace.sequence_starts, trace.n_tokens])
    hits, n_needed, n_named = (count / lengths[:, None] for count in counts)

    def ratios(total: Floats) -> tuple[Floats, Floats]:
        def statistic(weights: Floats) -> Floats:
            found, of = weights @ hits, weights @ total
            above, below = np.append(found, found.sum()), np.append(of, of.sum())
            return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)

        return jackknife(statistic, lengths)

    (recall, recall_se), (precision, precision_se) = ratios(n_needed), ratios(n_named)
    return Predictability(
        recall=recall[:-1],
        recall_se=recall_se[:-1],
        precision=precision[:-1],
        precision_se=precision_se[:-1],
        mean_recall=(float(recall[-1]), none_if_unknown(recall_se[-1])),
        mean_precision=(float(precision[-1]), none_if_unknown(precision_se[-1])),
    )


def hit_probability(
    trace: RoutingTrace,
    keep: NDArray[np.bool_],
    predictor: str,
    distance: int,
    gating: GatingTable | None = None,
) -> Floats:
    """Return how likely the candidate of each rank is needed, float64 [L, C]; 0 where none is.

    Args:
        trace: recorded routing with predictions.
        keep: bool [T, L, K], which of the router's experts are needed.
        predictor: whose predictions.
        distance: how many layers ahead.
        gating: counts only candidates that it would keep by their predicted scores; all if None.

    Raises:
        RecordError: the trace has no such predictions.
        ValueError: they name too few candidates.
    """
    prediction = recorded_prediction(trace, predictor, distance)
    named = _candidates(trace, prediction, gating, None if gating else prediction.n_candidates)
    hits = (are_needed(trace, keep, prediction.experts) & named).sum(axis=0)
    return hits / np.maximum(1, named.sum(axis=0))


def with_baselines(
    trace: RoutingTrace, known: RoutingTrace | None = None, n_candidates: int | None = None
) -> RoutingTrace:
    """Return a trace with what needs no model predicted too, for every layer at distance 0.

    `frequency` names the experts used most in the known trace, `token_table_all` those of the
    highest mean router score of the same token there, or of all tokens for one not seen there,
    and `previous_token` those of the highest score for the token before.

    Args:
        trace: recorded routing.
        known: what is known of routing; if None every second sequence of the trace, which is then
            left out of what is returned.
        n_candidates: C; the router's K if None.

    Raises:
        RecordError: one of the traces is without the router's scores of all experts.
    """
    if known is None:
        numbers = range(len(trace.sequence_starts))
        known, trace = trace.of_sequences(numbers[::2]), trace.of_sequences(numbers[1::2])
    probs = trace.all_router_probs()
    scores = {
        FREQUENCY: np.broadcast_to(
            expert_use(known.expert_indices, known.spec.n_experts) / known.spec.top_k,
            probs.shape,
        ),
        TOKEN_TABLE_ALL: _scores_of_same_tokens(known, trace),
        PREVIOUS_TOKEN: np.roll(probs, 1, axis=0),
    }
    n_candidates = trace.spec.top_k if n_candidates is None else n_candidates
    predictions = {name: _ranked(score, n_candidates) for name, score in scores.items()}
    of_last = predictions[PREVIOUS_TOKEN]
    experts, last_scores = of_last.experts.copy(), of_last.scores.copy()
    experts[trace.sequence_starts], last_scores[trace.sequence_starts] = -1, 0
    predictions[PREVIOUS_TOKEN] = Prediction(experts, last_scores)
    added = {name: {0: prediction} for name, prediction in predictions.items()}
    return replace(trace, predictions={**trace.predictions, **added})


def _scores_of_same_tokens(known: RoutingTrace, trace: RoutingTrace) -> Floats:
    """Return the mean score [T, L, E] that a trace's tokens had in a known trace."""
    probs = known.all_router_probs()
    every = probs.mean(axis=0, dtype=np.float64)
    means = means_by_token(known.token_ids, probs, every)
    distinct = np.unique(known.token_ids)
    places = np.searchsorted(distinct, trace.token_ids).clip(max=len(distinct) - 1)
    is_known = distinct[places] == trace.token_ids
    return np.where(is_known[:, None, None], means[places], every)


def _ranked(scores: NDArray[np.floating], n_candidates: int) -> Prediction:
    experts = np.argsort(-scores, axis=2, kind="stable")[:, :, :n_candidates]
    best = np.take_along_axis(scores, experts, axis=2)
    return Prediction(experts.astype(np.int16), best.astype(np.float16))


def are_needed(
    trace: RoutingTrace, keep: NDArray[np.bool_], experts: NDArray[np.int16]
) -> NDArray[np.bool_]:
    """Return which of the experts named [T, L, C] are among those kept, bool [T, L, C]."""
    needed = np.where(keep, trace.expert_indices, -2)  # neither an expert nor the mark for none
    return (experts[:, :, :, None] == needed[:, :, None, :]).any(axis=3)


def _candidates(
    trace: RoutingTrace,
    prediction: Prediction,
    gating: GatingTable | None,
    n_candidates: int | None,
) -> NDArray[np.bool_]:
    """Return which of a prediction's candidates count, bool [T, L, C]."""
    is_there = prediction.experts >= 0
    wanted = trace.spec.top_k if n_candidates is None else n_candidates
    if not 1 <= wanted <= prediction.n_candidates:
        raise ValueError(
            f"{wanted} candidates are asked for, and {prediction.n_candidates} were recorded; give "
            f"candidates in 1..{prediction.n_candidates}, or profile(..., n_candidates={wanted})."
        )
    if gating is None or n_candidates is not None:
        return is_there & (np.arange(prediction.n_candidates) < wanted)
    scores = prediction.scores[:, :, :wanted].astype(np.float32)
    scores[scores.sum(axis=2) == 0] = 1.0  # not predicted, and so not there
    is_kept = np.zeros_like(is_there)
    for layer, cuts in enumerate(gating.cuts):
        is_kept[:, layer, :wanted] = keep_by_cuts(scores[:, layer], cuts, gating.quantity)
    return is_there & is_kept
