import itertools
import json
import re
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
from traces import make_sensitivity, make_spec, make_trace

import adapmoe_lab as lab
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.gating.uniform import UniformCut
from adapmoe_lab.records import OFF, LossReport, TunedConfig
from adapmoe_lab.simulation.simulate import simulate
from adapmoe_lab.views import figures
from adapmoe_lab.views.figures import theme


def a_profile(fisher=(40.0, 8.0, 1.0)):
    profile = make_sensitivity(fisher=fisher, increase_scale=1.0)
    return replace(
        profile, anchors=np.array([[1.0, 2.0, 0.1]]), factor=[2.0], joint_error=[1.0]
    )  # twice what the curves say


def a_simulation(skipped_fraction=0.2):
    trace = make_trace()
    config = TunedConfig(
        model=TunedConfig.model_identity(trace.spec),
        gating=UniformCut(trace).table(skipped_fraction),
        plan=slots_plan(trace.spec, 4),
    )
    return simulate(trace, config)


def a_prediction(ms, nats, skipped=0.1):
    return replace(
        a_simulation(skipped), ms_per_token=ms, loss_increase_nats=nats, loss_increase_se=nats / 10
    )


def every_figure():
    trace = make_trace()
    texts = [f" <b>{i}" for i in range(100)]
    measured = figures.MeasuredPoint(30.0, (29.0, 32.0), 0.004, 0.001, "tuned")
    curve = [a_prediction(40.0, 0.0, 0.0), a_prediction(25.0, 0.02, 0.25)]
    published = lab.published_adapmoe()
    estimators = {name: a_profile() for name in ("fisher", "ablation", "divergence")}
    uniform, loss = UniformCut(trace), LossReport([9.0, 8.0], [2, 2], 0.2, "texts")
    kinds = replace(trace, sequence_starts=[0, 50, 100, 150], labels=["<i>", "b", "<i>", "b"])
    return {
        "expert_use": figures.plot_expert_use(figures.expert_use_info(trace)),
        "heterogeneity": figures.plot_load_heterogeneity(figures.load_heterogeneity_info(trace)),
        "token_routing": figures.plot_token_routing(figures.token_routing_info(trace, texts)),
        "sensitivity": figures.plot_sensitivity(figures.sensitivity_info(a_profile(), 0.8)),
        "layer_bars": figures.plot_layer_bars(
            figures.layer_bars_info(a_simulation(), a_simulation(0.0))
        ),
        "tradeoff": figures.plot_tradeoff(
            figures.tradeoff_info(curve, curve[1], [measured], budget_nats=0.01)
        ),
        "use_against_chance": figures.plot_use_against_chance(
            figures.use_against_chance_info(trace)
        ),
        "co_activation": figures.plot_co_activation(figures.co_activation_info(trace, 0)),
        "locality": figures.plot_locality(figures.locality_info(trace)),
        "specialisation": figures.plot_specialisation(figures.specialisation_info(kinds)),
        "sensitivity_shares": figures.plot_sensitivity_shares(
            figures.sensitivity_shares_info(estimators)
        ),
        "estimator_agreement": figures.plot_estimator_agreement(
            figures.estimator_agreement_info(estimators, trace)
        ),
        "sum_of_layers": figures.plot_sum_of_layers(figures.sum_of_layers_info(estimators)),
        "rule_cuts": figures.plot_rule_cuts(
            figures.rule_cuts_info({"one": uniform.table(0.2)}, trace)
        ),
        "loss_by_rule": figures.plot_loss_by_rule(
            figures.loss_by_rule_info({"one": uniform}, a_profile(), {"one": [loss]}, loss)
        ),
        "surrogates": figures.plot_surrogates(figures.surrogates_info({"nothing": loss}, loss)),
        "predictability": figures.plot_predictability(figures.predictability_info(trace)),
        "published_cuts": figures.plot_published_cuts(figures.published_cuts_info(published)),
        "published_accuracy": figures.plot_published_accuracy(
            figures.published_accuracy_info(published)
        ),
    }


def axis_titles(figure):
    layout = figure.to_plotly_json()["layout"]
    axes = sorted(name for name in layout if re.fullmatch(r"[xy]axis\d?", name))
    return {name: layout[name].get("title", {}).get("text", "") for name in axes}


def test_expert_use_counts_tokens_per_layer_and_expert():
    trace = make_trace(make_spec(n_layers=2, n_experts=6, top_k=3), n_tokens=50)
    info = figures.expert_use_info(trace)
    for layer in range(2):
        for expert in range(6):
            n = sum(expert in trace.expert_indices[token, layer] for token in range(50))
            assert info.use[layer, expert] == pytest.approx(n / 50)
    assert info.uniform_use == 0.5
    assert (info.n_tokens, info.model_id) == (50, "synthetic")


def test_even_use_has_the_neutral_colour():
    figure = every_figure()["expert_use"]
    cells = figure.data[0]
    at_even = 0.25 / (cells.zmax - cells.zmin)
    assert (pytest.approx(at_even), theme.MIDDLE) in cells.colorscale


def test_locality_against_brute_force():
    trace = make_trace(n_tokens=60)
    info = figures.load_heterogeneity_info(trace)
    starts = set(trace.sequence_starts.tolist())
    for layer in range(trace.spec.n_layers):
        sets = [set(row.tolist()) for row in trace.expert_indices[:, layer]]
        now = [len(sets[t] & sets[t - 1]) / 2 for t in range(60) if t not in starts]
        pairs = [len(a & b) / 2 for a in sets for b in sets]
        assert info.locality[layer] == pytest.approx(np.mean(now))
        assert info.locality_by_chance[layer] == pytest.approx(np.mean(pairs))
    assert (info.locality > info.locality_by_chance).all()


@pytest.mark.parametrize(
    ("chosen", "effective"),
    [([[0, 1], [2, 3]], 4.0), ([[0, 1], [0, 1]], 2.0), ([[0, 1], [0, 2]], 2 * 2**0.5)],
)
def test_effective_experts_of_known_loads(chosen, effective):
    trace = make_trace(make_spec(n_layers=1, n_experts=4), n_tokens=4)
    trace = replace(trace, expert_indices=np.array(chosen * 2)[:, None, :])
    info = figures.load_heterogeneity_info(trace)
    assert info.effective_experts == pytest.approx([effective])


def test_locality_needs_two_tokens_in_a_row():
    trace = replace(make_trace(n_tokens=2), sequence_starts=[0, 1])
    with pytest.raises(ValueError, match="Profile longer texts"):
        figures.load_heterogeneity_info(trace)


def test_token_routing_ranks_the_experts_of_one_sequence():
    trace = make_trace(make_spec(top_k=3), n_tokens=20)
    backwards = replace(
        trace, expert_indices=trace.expert_indices[:, :, ::-1], weights=trace.weights[:, :, ::-1]
    )
    info = figures.token_routing_info(backwards, list("abcdefghij"), sequence=1, max_tokens=4)
    assert (info.tokens, info.label) == (("a", "b", "c", "d"), "second")
    assert info.experts.tolist() == trace.expert_indices[10:14].transpose(1, 0, 2).tolist()
    assert info.shares == pytest.approx(trace.shares[10:14].transpose(1, 0, 2))
    assert info.top_share == pytest.approx(backwards.shares[10:14].max(axis=2).T)


def test_token_routing_wants_the_text_of_every_token():
    with pytest.raises(ValueError, match="has 100 tokens, but 3 token texts came"):
        figures.token_routing_info(make_trace(), ["a", "b", "c"])


def test_token_text_is_shown_as_it_is_and_never_as_markup():
    info = figures.token_routing_info(make_trace(n_tokens=8), [" <b>", "\n", "  ", "a"])
    figure = figures.plot_token_routing(info)
    assert figure.layout.xaxis.ticktext == ("&lt;b&gt;", "↵", "␣", "a")
    best, share = info.experts[2, 3, 0], info.shares[2, 3, 0]
    assert figure.data[0].text[2][3].startswith(f"<b>a</b>, layer 2<br>expert {best}: {share:.0%}")


def test_sensitivity_predicts_in_millinats_at_the_cuts():
    info = figures.sensitivity_info(a_profile(), [0.5, 0.75, OFF])
    assert info.increase_millinats == pytest.approx([1e3 * 20.0, 1e3 * 1.0, 0.0])
    assert info.increase_se_millinats == pytest.approx([1e3 * 2.0, 1e3 * 0.1, 0.0])
    one_cut = figures.sensitivity_info(a_profile(), 0.5)
    assert one_cut.cuts.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("cost", "log_scale"),
    [((31.0, 1.0), True), ((29.0, 1.0), False), ((40.0, 0.0), False), ((40.0, -1.0), False)],
)
def test_the_cost_axis_is_logarithmic_only_where_needed_and_possible(cost, log_scale):
    info = figures.sensitivity_info(a_profile(cost), 0.8)
    assert info.log_scale is log_scale
    shown = figures.plot_sensitivity(info).layout.yaxis.type
    assert shown == ("log" if log_scale else None)


def test_layer_bars_show_a_simulation_beside_its_baseline():
    simulation, baseline = a_simulation(), a_simulation(0.0)
    info = figures.layer_bars_info(simulation, baseline)
    figure = figures.plot_layer_bars(info)
    drawn = [np.asarray(trace.y) for trace in figure.data]
    wanted = [simulation.experts_per_token, simulation.hit_rate]
    wanted += [baseline.experts_per_token, baseline.hit_rate]
    assert np.array_equal(drawn, wanted)
    assert f"{simulation.mean_hit_rate:.0%} hits" in figure.layout.title.text
    assert len(figures.plot_layer_bars(figures.layer_bars_info(simulation)).data) == 2


def test_tradeoff_is_in_millinats_with_errors_around_what_was_measured():
    measured = figures.MeasuredPoint(30.0, (29.0, 32.0), 0.004, 0.001, "tuned")
    curve = [a_prediction(40.0, 0.0, 0.0), a_prediction(25.0, 0.02, 0.25)]
    info = figures.tradeoff_info(curve, a_prediction(28.0, 0.01, 0.2), [measured], 0.01)
    assert info.skipped_fraction == pytest.approx([0.0, 0.25], abs=0.01)
    assert info.ms_per_token.tolist() == [40.0, 25.0]
    assert info.loss_millinats == pytest.approx([0.0, 20.0])
    assert info.loss_se_millinats == pytest.approx([0.0, 2.0])
    assert info.current == pytest.approx((0.2, 28.0, 10.0), abs=0.01)
    assert info.budget_millinats == pytest.approx(10.0)
    points = figures.plot_tradeoff(info).data[-1]
    assert (points.x, points.y) == ((30.0,), (4.0,))
    assert (points.error_x.array, points.error_x.arrayminus) == ((2.0,), (1.0,))
    assert points.error_y.array == (1.0,)


def test_tradeoff_without_a_time_says_what_to_pass():
    with pytest.raises(ValueError, match="pass `hardware` and `sensitivity`"):
        figures.tradeoff_info([a_simulation()])


def test_every_axis_says_what_it_shows_and_in_which_unit():
    titles = {name: axis_titles(figure) for name, figure in every_figure().items()}
    millinats = "loss increase (millinats per token)"
    layers = {"xaxis": "layer", "xaxis2": "layer"}
    assert titles == {
        "expert_use": {"xaxis": "expert", "yaxis": "layer"},
        "heterogeneity": {
            **layers,
            "yaxis": "effective experts",
            "yaxis2": "repeated experts",
        },
        "token_routing": {"xaxis": "token", "yaxis": "layer"},
        "sensitivity": {
            **layers,
            "yaxis": "mean ‖∂ loss / ∂ output‖² (nats²)",
            "yaxis2": millinats,
        },
        "layer_bars": {**layers, "yaxis": "experts per token", "yaxis2": "hit rate"},
        "tradeoff": {"xaxis": "time per output token (ms)", "yaxis": millinats},
        "use_against_chance": {"xaxis": "layer", "yaxis": "use / even use"},
        "co_activation": dict.fromkeys(("xaxis", "xaxis2", "yaxis", "yaxis2"), "expert"),
        "locality": {
            "xaxis": "layer",
            "xaxis2": "distance in tokens",
            "yaxis": "repeated experts",
            "yaxis2": "repeated experts",
        },
        "specialisation": {
            "xaxis": "layer",
            "xaxis2": "expert",
            "yaxis": "information (bits)",
            "yaxis2": "kind of text",
        },
        "sensitivity_shares": {
            **dict.fromkeys(("xaxis", "xaxis2", "xaxis3"), "layer"),
            **{"yaxis": "share of the cost", "yaxis2": "", "yaxis3": ""},
        },
        "estimator_agreement": {
            "xaxis": "Spearman's rank correlation",
            "xaxis2": millinats,
            **{"yaxis": "", "yaxis2": ""},
        },
        "sum_of_layers": {
            "xaxis": "measured divergence, all layers skipping (millinats per token)",
            "yaxis": "sum / measured",
        },
        "rule_cuts": {
            **layers,
            "yaxis": "cut on the share",
            "yaxis2": "skipped of the layer's activations",
        },
        "loss_by_rule": {"xaxis": "expert activations skipped", "yaxis": millinats},
        "surrogates": {
            "xaxis": millinats,
            "xaxis2": "difference (millinats per token)",
            **{"yaxis": "", "yaxis2": ""},
        },
        "predictability": {"xaxis": "layer", "yaxis": "predictor"},
        "published_cuts": {
            **layers,
            "yaxis": "published sensitivity S",
            "yaxis2": "cut on the best share",
        },
        "published_accuracy": {
            "xaxis": "expert activations skipped",
            "xaxis2": "tokens run with one expert (the paper's percentage)",
            "yaxis": "MMLU accuracy",
        },
    }


def test_no_figure_names_an_address_or_offers_to_upload_itself():
    for figure in every_figure().values():
        assert isinstance(figure, go.Figure)
        text = figure.to_json()
        assert "http" not in text
        modebar = json.loads(text)["layout"]["template"]["layout"]["modebar"]
        assert "sendChartToCloud" in modebar["remove"]


@pytest.mark.parametrize("n_layers", [1, 8, 32, 64, 100])
def test_a_layer_axis_has_a_readable_number_of_labels(n_layers):
    axis = theme.layer_axis(n_layers)
    assert 1 <= n_layers / axis["dtick"] <= 16
    assert axis["range"] == [-0.5, n_layers - 0.5]


@pytest.mark.parametrize(("n_panels", "n_rows"), [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_panels_fill_the_page_row_by_row_and_never_overlap(n_panels, n_rows):
    grid = theme.panel_grid(n_panels, 3)
    assert len(grid) == n_panels
    assert len({tuple(rows) for _, rows in grid}) == n_rows
    assert (grid[0][0][0], grid[0][1][1]) == (0, 1)
    assert grid[-1][1][0] == pytest.approx(0)
    assert all(0 <= low < high <= 1 + 1e-9 for panel in grid for low, high in panel)
    for (x, y), (other_x, other_y) in itertools.combinations(grid, 2):
        assert x[1] < other_x[0] or y[0] > other_y[1]


def test_text_can_be_read_on_light_and_on_dark_pages():
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    ink = luminance(theme.INK)
    assert (1 + 0.05) / (ink + 0.05) > 4
    assert (ink + 0.05) / (luminance("#111111") + 0.05) > 4
