"""Figures of what rules skip and what that costs."""

from dataclasses import replace

import numpy as np
import pytest
from traces import make_sensitivity, make_spec, make_trace

from adapmoe_lab.policies.gating.keep import kept_experts, score_ratio
from adapmoe_lab.policies.gating.registry import RULES
from adapmoe_lab.records import OFF, GatingTable, LossReport
from adapmoe_lab.views import figures


def a_report(increase_nats=0.0, skipped_fraction=0.0, n_texts=4):
    """A loss that is `increase_nats` higher on average, by turns 10 % more and less of it."""
    uneven = increase_nats * (1 + 0.1 * (-1.0) ** np.arange(n_texts))
    return LossReport(
        nats=50 * (np.arange(n_texts) + uneven),
        n_predicted=np.full(n_texts, 50),
        skipped_fraction=skipped_fraction,
        texts="the same",
    )


def rules(trace, sensitivity):
    return {name: prepare(trace, sensitivity) for name, prepare in RULES.items()}


@pytest.mark.parametrize("top_k", [2, 4])
def test_rules_are_shown_with_what_each_layer_skips(top_k):
    trace = make_trace(make_spec(top_k=top_k), n_tokens=500)
    prepared = rules(trace, make_sensitivity(trace.spec))
    tables = {name: rule.table(0.2) for name, rule in prepared.items()}
    info = figures.rule_cuts_info(tables, trace)
    assert info.names == tuple(RULES)
    for i, table in enumerate(tables.values()):
        kept = kept_experts(trace, table)
        assert info.cuts[i] == pytest.approx(table.cuts[:, 0])
        for layer in range(3):
            assert info.skipped[i, layer] == pytest.approx(1 - kept[:, layer].mean())
    assert info.skipped_fraction == pytest.approx([0.2] * 3, abs=0.002)
    assert np.ptp(info.cuts[0]) == 0
    assert info.cuts[1, 0] > info.cuts[1, 2]  # the rule spares the layer of higher sensitivity
    figure = figures.plot_rule_cuts(info)
    assert f"{top_k * 0.8:.2f} experts per token instead of {top_k}" in figure.layout.title.text
    assert figure.layout.shapes[0].y0 == 1 / top_k


def test_a_layer_that_skips_nothing_has_no_cut_to_draw():
    table = GatingTable.per_layer([0.7, OFF, 0.9], 2)
    figure = figures.plot_rule_cuts(figures.rule_cuts_info({"mine": table}, make_trace()))
    cuts, skipped = figure.data
    assert np.isnan(cuts.y).tolist() == [False, True, False]
    assert skipped.y[1] == 0
    assert (skipped.xaxis, skipped.yaxis) == ("x2", "y2")


@pytest.mark.parametrize(
    "table", [GatingTable([[0.5, 0.6, 0.7]] * 3), score_ratio(3, 4, 0.5)], ids=["steps", "ratio"]
)
def test_tables_that_are_no_line_are_refused(table):
    with pytest.raises(ValueError, match=r"'mine' has more than one cut per layer, or cuts on som"):
        figures.rule_cuts_info({"mine": table}, make_trace(make_spec(top_k=4)))


def test_loss_is_predicted_along_each_rule_and_measured_beside_it():
    trace = make_trace(n_tokens=1000)
    sensitivity = make_sensitivity(trace.spec)
    prepared = rules(trace, sensitivity)
    measured = {"uniform": [a_report(0.001, 0.1), a_report(0.004, 0.2)]}
    info = figures.loss_by_rule_info(
        prepared, sensitivity, measured, a_report(), skipped_fractions=[0.0, 0.1, 0.3]
    )
    for name, rule in prepared.items():
        found = info.rules[name]
        expected = [sensitivity.total_increase(rule.table(f).cuts[:, 0]) for f in (0.0, 0.1, 0.3)]
        assert found.predicted == pytest.approx([1e3 * mean for mean, _ in expected])
        assert found.predicted_se == pytest.approx([1e3 * error for _, error in expected])
        assert found.predicted[0] == 0
    points = info.rules["uniform"]
    assert points.measured_skipped.tolist() == [0.1, 0.2]
    assert points.measured == pytest.approx([1.0, 4.0])
    assert points.measured_se == pytest.approx([0.1 / 3**0.5, 0.4 / 3**0.5])
    assert len(info.rules["curve"].measured) == 0
    assert (info.n_predicted_on, info.n_measured_on) == (100, 200)


def test_points_of_one_fraction_stand_side_by_side_and_tell_their_own():
    trace, sensitivity = make_trace(), make_sensitivity()
    measured = {name: [a_report(0.004, 0.2)] for name in RULES}
    info = figures.loss_by_rule_info(rules(trace, sensitivity), sensitivity, measured, a_report())
    assert [rule.skipped.max() for rule in info.rules.values()] == pytest.approx([0.45] * 3)
    points = figures.plot_loss_by_rule(info).data[-3:]
    places = [point.x[0] for point in points]
    assert places == sorted(set(places))
    assert places[1] == pytest.approx(0.2)
    assert places == pytest.approx([0.2] * 3, abs=0.005)
    assert [point.customdata[0][0] for point in points] == [0.2] * 3
    assert len({point.marker.color for point in points}) == 3


def test_losses_of_a_rule_that_is_not_there_are_refused():
    trace, sensitivity = make_trace(), make_sensitivity()
    prepared = rules(trace, sensitivity)
    with pytest.raises(ValueError, match="measured of mine; the rules are uniform, adapmoe, curve"):
        figures.loss_by_rule_info(prepared, sensitivity, {"mine": [a_report()]}, a_report())


def test_surrogates_are_compared_with_no_skipping_and_with_the_first():
    reports = {"nothing": a_report(0.010, 0.2), "rank 16": a_report(0.004, 0.2)}
    info = figures.surrogates_info(reports, a_report())
    assert info.names == ("nothing", "rank 16")
    assert info.increase == pytest.approx([10.0, 4.0])
    assert info.increase_se == pytest.approx([1 / 3**0.5, 0.4 / 3**0.5])
    assert info.difference == pytest.approx([0.0, -6.0])
    assert info.difference_se == pytest.approx([0.0, 0.6 / 3**0.5])
    assert (info.skipped_fraction, info.n_tokens) == (pytest.approx(0.2), 200)


def test_surrogates_on_other_texts_are_not_compared():
    with pytest.raises(ValueError, match="can only be compared on the same texts"):
        figures.surrogates_info({"nothing": replace(a_report(0.01), texts="others")}, a_report())
    with pytest.raises(ValueError, match="no loss to compare; measure at least one"):
        figures.surrogates_info({}, a_report())
