"""Recall, precision and hit probability against counting sets of experts one token at a time."""

from dataclasses import replace

import numpy as np
import pytest
from traces import make_spec, make_trace

from adapmoe_lab.policies.gating.keep import kept_experts, top_p
from adapmoe_lab.records import GatingTable, Prediction, RecordError
from adapmoe_lab.simulation.statistics.predictability import (
    hit_probability,
    recall_and_precision,
    with_baselines,
)

SPEC = make_spec(n_layers=3, n_experts=8, top_k=3)
GATING = GatingTable(np.array([[0.5, 0.8], [0.4, 2.0], [0.6, 0.7]]))
STARTS = np.array([0, 50, 90, 170])


def a_trace(n_candidates=4, seed=0):
    """Return a trace of four texts whose predictions are noisy, and missing in layer 0."""
    trace = make_trace(SPEC, n_tokens=200, seed=seed)
    noise = np.random.default_rng(seed).dirichlet(np.ones(8), (200, 3))
    scores = (trace.router_probs + noise) / 2
    experts = np.argsort(-scores, axis=2)[:, :, :n_candidates]
    scores = np.take_along_axis(scores, experts, axis=2)
    experts[:, 0], scores[:, 0] = -1, 0
    return replace(
        trace,
        predictions={"mine": {1: Prediction(experts, scores)}},
        sequence_starts=STARTS,
        labels=["a", "b", "c", "d"],
    )


def shares_kept(scores, cuts):
    """Return how many of a token's experts a gate keeps, the best first."""
    shares = np.float32(scores) / np.float32(scores).sum()
    for n_kept, cut in enumerate(cuts, start=1):
        if shares[:n_kept].sum() >= cut:
            return n_kept
    return len(scores)


def counted(trace, layer, gating, candidates, tokens=range(200)):
    """Return hits, needed and predicted of one layer, token by token."""
    prediction = trace.predictions["mine"][1]
    hits = n_needed = n_named = 0
    for token in tokens:
        weights = np.sort(trace.weights[token, layer])[::-1]
        order = np.argsort(-trace.weights[token, layer], kind="stable")
        n_kept = shares_kept(weights, gating.cuts[layer]) if gating else 3
        needed = set(trace.expert_indices[token, layer][order[:n_kept]].tolist())
        n_candidates = candidates or 3
        if gating and candidates is None:
            scores = prediction.scores[token, layer, :3]
            n_candidates = shares_kept(scores, gating.cuts[layer])
        named = set(prediction.experts[token, layer, :n_candidates].tolist())
        hits += len(needed & named)
        n_needed += len(needed)
        n_named += len(named)
    return hits, n_needed, n_named


@pytest.mark.parametrize("gating", [None, GATING])
@pytest.mark.parametrize("candidates", [None, 1, 3, 4])
def test_recall_and_precision_equal_counted_sets(gating, candidates):
    trace = a_trace()
    found = recall_and_precision(trace, "mine", 1, gating, candidates)
    totals = np.zeros(3)
    for layer in (1, 2):
        hits, n_needed, n_named = counted(trace, layer, gating, candidates)
        totals += hits, n_needed, n_named
        assert found.recall[layer] == pytest.approx(hits / n_needed)
        assert found.precision[layer] == pytest.approx(hits / n_named)
    assert found.mean_recall[0] == pytest.approx(totals[0] / totals[1])
    assert found.mean_precision[0] == pytest.approx(totals[0] / totals[2])
    assert np.isnan([found.recall[0], found.precision[0], found.recall_se[0]]).all()


def test_errors_are_those_of_leaving_out_each_text():
    trace = a_trace()
    ends = [*STARTS[1:], 200]
    texts = [range(start, end) for start, end in zip(STARTS, ends, strict=True)]
    without = []
    for left_out in texts:
        rest = [token for text in texts if text is not left_out for token in text]
        hits, n_needed, _ = counted(trace, 1, GATING, None, rest)
        without.append(hits / n_needed)
    expected = np.sqrt(3 / 4 * ((np.array(without) - np.mean(without)) ** 2).sum())
    found = recall_and_precision(trace, "mine", 1, GATING)
    assert found.recall_se[1] == pytest.approx(expected)


def test_perfect_predictions_are_all_needed():
    trace = make_trace(SPEC)
    for gating in (None, GATING):
        found = recall_and_precision(trace, "next_router", 1, gating)
        assert found.mean_recall == pytest.approx((1, 0), abs=2e-3)  # scores are float16
        assert found.mean_precision == pytest.approx((1, 0), abs=2e-3)


@pytest.mark.parametrize("gating", [None, GATING])
def test_hit_probability_equals_counting(gating):
    trace = a_trace()
    keep = kept_experts(trace, GATING)
    found = hit_probability(trace, keep, "mine", 1, gating)
    assert found.shape == (3, 4)
    assert not found[0].any()
    prediction = trace.predictions["mine"][1]
    for layer in (1, 2):
        hits, asked = np.zeros(4), np.zeros(4)
        for token in range(200):
            needed = trace.expert_indices[token, layer][keep[token, layer]]
            n_kept = 4
            if gating:
                n_kept = shares_kept(prediction.scores[token, layer, :3], gating.cuts[layer])
            for rank in range(n_kept):
                asked[rank] += 1
                hits[rank] += prediction.experts[token, layer, rank] in needed
        np.testing.assert_allclose(found[layer], hits / np.maximum(1, asked))


def test_a_gate_never_counts_candidates_that_it_would_drop():
    trace = a_trace()
    keep = kept_experts(trace, None)
    found = hit_probability(trace, keep, "mine", 1, top_p(3, 3, 1e-6))
    assert (found[1:, 0] > 0).all()
    assert not found[:, 1:].any()


def test_baselines_know_one_half_and_are_judged_on_the_other():
    trace = a_trace(n_candidates=3)
    judged = with_baselines(trace)
    assert judged.labels == ("b", "d")
    known = np.r_[0:50, 90:170]
    tokens = np.r_[50:90, 170:200]
    np.testing.assert_array_equal(judged.token_ids, trace.token_ids[tokens])
    assert "mine" in judged.predictions
    named = {
        name: judged.predictions[name][0].experts for name in judged.predictions if name != "mine"
    }
    for layer in range(3):
        counts = np.bincount(trace.expert_indices[known, layer].ravel(), minlength=8)
        best = set(np.argsort(-counts, kind="stable")[:3].tolist())
        assert {frozenset(row) for row in named["frequency"][:, layer].tolist()} == {
            frozenset(best)
        }
    n_seen = 0
    every = trace.router_probs[known].astype(float).mean(axis=0)
    for place, token in enumerate(tokens):
        same = known[trace.token_ids[known] == trace.token_ids[token]]
        n_seen += len(same) > 0
        total = trace.router_probs[same].astype(float).sum(axis=0) + every
        expected = np.argsort(-total / (len(same) + 1), axis=1, kind="stable")[:, :3]
        np.testing.assert_array_equal(named["token_table_all"][place], expected)
        previous = named["previous_token"][place]
        if token in (50, 170):
            assert (previous == -1).all()
        else:
            assert [set(row) for row in previous.tolist()] == [
                set(row) for row in trace.expert_indices[token - 1].tolist()
            ]
    assert 0 < n_seen < len(tokens)
    assert np.isfinite(recall_and_precision(judged, "previous_token", 0).recall).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("mine", 2),
            r"no predictions of 'mine' at distance 2; it holds mine at \[1\]\. Record it again",
        ),
        (("ridge", 1), r"those that are fitted need profile\(\.\.\., predictors="),
        (("mine", 1, None, 5), r"5 candidates are asked for, and 4 were recorded"),
    ],
)
def test_what_was_not_recorded_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        recall_and_precision(a_trace(), *arguments)


def test_baselines_need_the_scores_of_all_experts():
    with pytest.raises(RecordError, match="without router_probs"):
        with_baselines(a_trace().chosen_only())
    with pytest.raises(RecordError, match="without router_probs"):
        with_baselines(a_trace(), known=a_trace().chosen_only())
