"""The figure of what is predicted, against the report that it shows."""

from dataclasses import replace

import numpy as np
import pytest
from traces import make_spec, make_trace

from adapmoe_lab.policies.gating.keep import top_p
from adapmoe_lab.records import Prediction
from adapmoe_lab.simulation.statistics.predictability import recall_and_precision, with_baselines
from adapmoe_lab.views import figures


def test_predictors_are_ordered_by_mean_recall_and_named_with_their_distance():
    trace = with_baselines(make_trace(n_tokens=300))
    info = figures.predictability_info(trace)
    assert info.names[0] == "next router, 1 ahead"
    assert set(info.names[1:]) == {
        "most used experts",
        "table of tokens for every layer",
        "experts of the token before",
    }
    assert (np.diff(info.mean_recall) <= 0).all()
    assert info.recall[0] == pytest.approx(1)
    place = info.names.index("experts of the token before")
    found = recall_and_precision(trace, "previous_token", 0)
    np.testing.assert_array_equal(info.recall[place], found.recall)
    np.testing.assert_array_equal(info.precision[place], found.precision)
    assert (info.n_candidates, info.n_tokens, info.n_texts) == (2, 150, 1)


def test_layers_that_are_not_predicted_stay_empty():
    trace = make_trace(make_spec(n_layers=3))
    (given,) = trace.predictions["next_router"].values()
    experts = given.experts.copy()
    experts[:, 0] = -1
    predicted = {"mine": {2: Prediction(experts, given.scores)}}
    info = figures.predictability_info(replace(trace, predictions=predicted))
    figure = figures.plot_predictability(info)
    assert np.isnan(figure.data[0].z).tolist() == [[True, False, False]]
    assert figure.data[0].y == ("mine, 2 ahead  1.00",)
    assert "candidates: 2; 200 tokens of 2 texts" in figure.layout.title.text


def test_under_a_gating_candidates_are_what_it_would_keep():
    trace = make_trace()
    info = figures.predictability_info(trace, top_p(3, 2, 0.6))
    assert info.n_candidates is None
    title = figures.plot_predictability(info).layout.title.text
    assert "candidates: what the gating would keep" in title
    assert figures.predictability_info(trace, top_p(3, 2, 0.6), candidates=1).n_candidates == 1


def test_a_trace_without_predictions_has_nothing_to_show():
    with pytest.raises(ValueError, match="holds no predictions; record it again"):
        figures.predictability_info(replace(make_trace(), predictions={}))
