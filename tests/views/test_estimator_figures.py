"""Figures that judge estimators of sensitivity by what was measured."""

from dataclasses import replace

import numpy as np
import pytest
from traces import make_sensitivity, make_spec, make_trace

from adapmoe_lab.policies.gating.adapmoe import AdapMoERule
from adapmoe_lab.policies.gating.uniform import UniformCut
from adapmoe_lab.simulation.statistics.layer_costs import layer_costs, shares_of_total
from adapmoe_lab.views import figures

TRUTH = (4.0, 1.0, 2.0)


def profiles():
    """Estimates of three layers: one right, one upside down, one that errs around nothing."""
    right = make_sensitivity(fisher=TRUTH)
    noise = np.outer([1.0, 0.5, -2.0], (1 - right.cuts) ** 2) * 0.01
    return {
        "directional": right,
        "fisher": make_sensitivity(fisher=(1.0, 4.0, 2.0)),
        "ablation": replace(right, increase_nats=noise, increase_se=2 * abs(noise)),
        "divergence": right,
    }


def test_shares_are_those_of_each_layer_at_an_equal_skip():
    info = figures.sensitivity_shares_info(profiles())
    assert info.names == ("directional", "fisher", "ablation", "divergence")
    assert info.share[0] == pytest.approx(np.array(TRUTH) / 7)
    expected = [shares_of_total(*layer_costs(p, 0.25)) for p in profiles().values()]
    np.testing.assert_array_equal(info.share, [share for share, _ in expected])
    np.testing.assert_array_equal(info.share_se, [error for _, error in expected])
    assert info.even_share == pytest.approx(1 / 3)
    assert info.error[0] == pytest.approx(3 * np.sqrt((info.share_se[0] ** 2).mean()))
    assert np.isnan(info.share[2]).all()  # its costs add up to less than nothing


def test_every_estimator_has_a_panel_with_the_reference_behind_it():
    figure = figures.plot_sensitivity_shares(figures.sensitivity_shares_info(profiles()))
    grey, _, line = figure.data[3:6]  # of the second panel
    assert (grey.xaxis, line.xaxis) == ("x2", "x2")
    assert np.array(line.y) == pytest.approx(np.array([1, 4, 2]) / 7)
    low, high = np.array(grey.y[:2:-1]), np.array(grey.y[:3])
    assert (low + high) / 2 == pytest.approx(np.array(TRUTH) / 7)
    assert (high > low).all()
    headings = [annotation.text for annotation in figure.layout.annotations]
    assert headings[1].startswith("<b>fisher</b>  ± ")
    assert headings[2] == "<b>ablation</b>  sum is not above zero"


def test_one_text_leaves_the_error_unknown():
    unsure = replace(make_sensitivity(), increase_se=np.full((3, 33), np.nan))
    figure = figures.plot_sensitivity_shares(
        figures.sensitivity_shares_info({"divergence": unsure})
    )
    assert figure.layout.annotations[0].text == "<b>divergence</b>  ± not known"
    assert np.isfinite(figure.layout.yaxis.range).all()


def test_estimators_are_ranked_by_their_order_and_by_what_their_cuts_cost():
    trace = make_trace(n_tokens=1000)
    info = figures.estimator_agreement_info(profiles(), trace)
    assert info.references == ("divergence", "ablation")
    assert info.correlation[0, :3] == pytest.approx([1.0, -1.0, 0.5])
    assert info.correlation[1, :2] == pytest.approx([0.5, -0.5])
    assert np.isnan([info.correlation[0, 3], info.correlation[1, 2]]).all()
    assert info.repeatability[0] > 0.9 > 0.6 > info.repeatability[2]
    judge = profiles()["divergence"]
    uniform = judge.total_increase(UniformCut(trace).table(0.25).cuts[:, 0])[0]
    assert info.one_cut_millinats == pytest.approx(1e3 * uniform)
    assert info.cost_millinats[0] == info.cost_millinats[3] == info.cost_millinats.min()
    assert info.cost_millinats[1] > info.one_cut_millinats > info.cost_millinats[0]


def test_cuts_of_the_fisher_curve_cost_what_adapmoes_rule_costs():
    """The rule is the least loss under curves of S_l x the squared share dropped."""
    trace = make_trace(n_tokens=4000)
    best = trace.shares.max(axis=2).astype(np.float64)
    base = make_sensitivity(fisher=(9.0, 3.0, 1.0))
    reached = best[None] >= base.cuts[:, None, None]  # [B, T, L]
    penalty = (reached * (1 - best) ** 2).mean(axis=1).T  # [L, B]
    fisher = replace(
        base,
        increase_nats=penalty * base.fisher[:, None],
        skipped=reached.mean(axis=1).T / 2,
    )
    truth = make_sensitivity(fisher=TRUTH)
    info = figures.estimator_agreement_info(
        {"fisher": fisher, "divergence": truth}, trace, references=["divergence"]
    )
    rule = AdapMoERule(trace, fisher).table(0.25)
    expected, error = truth.total_increase(rule.cuts[:, 0])
    assert info.cost_millinats[0] == pytest.approx(1e3 * expected, rel=0.02)
    assert info.cost_se_millinats[0] == pytest.approx(1e3 * error, rel=0.02)


def test_the_judge_is_not_corrected_by_its_anchors():
    trace = make_trace(n_tokens=500)
    plain = figures.estimator_agreement_info(profiles(), trace)
    anchored = {
        name: replace(
            profile, anchors=np.array([[0.01, 0.03, 0.001]]), factor=[0.8], joint_error=[1.1]
        )
        for name, profile in profiles().items()
    }
    info = figures.estimator_agreement_info(anchored, trace)
    np.testing.assert_allclose(info.cost_millinats, plain.cost_millinats)


@pytest.mark.parametrize(
    "compare",
    [
        figures.sensitivity_shares_info,
        lambda some: figures.estimator_agreement_info(some, make_trace()),
    ],
)
def test_without_the_reference_it_says_what_to_measure(compare):
    with pytest.raises(ValueError, match=r"no profile of 'divergence' .* only of fisher; measure"):
        compare({"fisher": make_sensitivity()})


@pytest.mark.parametrize(("one_cut", "side"), [(1.0, "left"), (4.0, "right")])
def test_the_label_of_the_line_stays_inside(one_cut, side):
    info = figures.estimator_agreement_info(profiles(), make_trace())
    info = replace(info, cost_millinats=np.array([5.0, 5, 5, 5]), one_cut_millinats=one_cut)
    line = figures.plot_estimator_agreement(info).layout.shapes[1]
    assert (line.x0, line.label.xanchor) == (one_cut, side)


def test_sums_of_layers_are_compared_with_what_was_measured():
    rising = np.array([[0.002, 0.001, 0.0001], [0.012, 0.010, 0.002]])
    some = profiles()
    some["directional"] = replace(
        some["directional"], anchors=rising, factor=[1.0, 1.0], joint_error=[1.0, 1.0]
    )
    info = figures.sum_of_layers_info(some)
    assert list(info.sums) == ["directional"]
    sums = info.sums["directional"]
    assert sums.measured_millinats == pytest.approx([1, 10])
    assert sums.ratio == pytest.approx([2.0, 1.2])
    assert sums.ratio_se == pytest.approx([0.2, 0.24])
    low, high = 10 ** np.array(figures.plot_sum_of_layers(info).layout.yaxis.range)
    assert low < 1 < 2.0 < high


def test_sums_need_anchors():
    with pytest.raises(ValueError, match=r"with all layers skipping; use .*anchored=True"):
        figures.sum_of_layers_info(profiles())


def test_64_layers_are_lines_without_markers_and_few_labels():
    spec = make_spec(64, 8, 4)
    curves = make_sensitivity(spec, np.geomspace(9, 1, 64))
    figure = figures.plot_sensitivity_shares(
        figures.sensitivity_shares_info({"fisher": curves, "divergence": curves})
    )
    assert figure.data[2].mode == "lines"
    assert figure.layout.xaxis.dtick == 8
