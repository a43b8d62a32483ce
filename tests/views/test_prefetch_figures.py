"""Figures of prefetching: one step worked out on paper, gains by configs built apart."""

from dataclasses import replace

import numpy as np
import pytest
from traces import make_spec, make_trace, predicting

from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.records import (
    HardwareProfile,
    LatencyReport,
    Measurement,
    Prediction,
    PrefetchSource,
    PrefetchTable,
    RoutingTrace,
    Traffic,
    TunedConfig,
)
from adapmoe_lab.simulation.search.prefetch_search import plan_prefetch
from adapmoe_lab.simulation.simulate import replayed_and_timed, simulate
from adapmoe_lab.views import figures
from adapmoe_lab.views.figures.timing.timeline import LOOKS

HARDWARE = HardwareProfile(
    "gpu", "pcie", [250, 1000], [1e-3, 4e-3], dense_step_s=6e-3, expert_s=1e-3
)
"""A layer of 2 ms and an expert of 1 ms each; a load of 4 ms in chunks of 1 ms."""


def one_token(predicted):
    """Return a token that needs experts 0 and 1 in two layers; the second one is predicted."""
    spec = make_spec(n_layers=2, top_k=1)
    candidates = Prediction([[[-1], [predicted]]], [[[0], [1]]])
    return RoutingTrace(
        spec, [7], [[[0], [1]]], np.ones((1, 2, 1)), np.full((1, 2, 8), 1 / 8),
        {"next_router": {1: candidates}}, [0], [0], [True], ("one",),
    )  # fmt: skip


def following(spec, n_slots, probability=1.0):
    chance = np.full((spec.n_layers, spec.top_k), probability)
    table = PrefetchTable([PrefetchSource("next_router", 1, chance)], buffer_slots=4)
    return replace(TunedConfig.untuned(spec), plan=slots_plan(spec, n_slots), prefetch=table)


def told(step):
    rows = zip(step.kinds, step.layers, step.experts, step.begin_ms, step.end_ms, strict=True)
    return sorted(
        (
            (k, int(layer), int(e), round(float(b), 9), round(float(end), 9))
            for k, layer, e, b, end in rows
        ),
        key=lambda row: (row[3], row[0]),
    )


def test_a_step_is_what_it_is_on_paper():
    """On demand 2 + 4 + 1 for each layer; ahead, three of four chunks cross in 6..9."""
    trace = one_token(predicted=1)
    hardware = replace(HARDWARE, dense_step_s=4e-3)
    info = figures.timeline_info(trace, following(trace.spec, 4), hardware)
    without, ahead = info.steps
    assert told(without) == [
        ("dense", 0, -1, 0, 2),
        ("demand", 0, 0, 2, 6),
        ("waiting", 0, 0, 2, 6),
        ("expert", 0, 0, 6, 7),
        ("dense", 1, -1, 7, 9),
        ("demand", 1, 1, 9, 13),
        ("waiting", 1, 1, 9, 13),
        ("expert", 1, 1, 13, 14),
    ]
    assert told(ahead)[3:] == [
        ("ahead", 1, 1, 6, 9),
        ("expert", 0, 0, 6, 7),
        ("dense", 1, -1, 7, 9),
        ("demand", 1, 1, 9, 10),
        ("waiting", 1, 1, 9, 10),
        ("expert", 1, 1, 10, 11),
    ]
    assert (info.token, info.mean_ms) == (0, pytest.approx((14, 11)))


def test_a_wrong_prediction_crosses_for_nothing():
    trace = one_token(predicted=5)
    hardware = replace(HARDWARE, dense_step_s=4e-3)
    _, ahead = figures.timeline_info(trace, following(trace.spec, 4), hardware).steps
    assert ("wasted", 1, 5, 6, 9) in told(ahead)
    assert ahead.step_ms == pytest.approx(14)


@pytest.mark.parametrize("token", [0, 57, 199])
def test_events_add_up_to_the_counters_of_the_clock(token):
    trace = predicting(make_trace(), 0.6)
    hardware = replace(HARDWARE, miss_s=2e-4, wait_s=1e-4, predict_s=5e-5, host_copy_s=1e-4)
    config = following(trace.spec, 3)
    info = figures.timeline_info(trace, config, hardware, token)
    for step, each in zip(info.steps, (replace(config, prefetch=None), config), strict=True):
        _, timeline = replayed_and_timed(
            trace.as_decode(), each, kept_experts(trace, None), hardware
        )
        assert step.total_ms("waiting") == pytest.approx(1e3 * timeline.stall_s[token].sum())
        assert step.total_ms("dense") == pytest.approx(6)
        assert step.total_ms("expert") == pytest.approx(6)  # two in each of three layers
        assert step.step_ms == pytest.approx(1e3 * timeline.step_s[token])
        crossed = sum(step.total_ms(kind) for kind in ("demand", "ahead", "wasted"))
        assert crossed == pytest.approx(1e3 * timeline.link_s[token])
        for kind, counted in (("ahead", timeline.used), ("wasted", timeline.wasted)):
            found = {row[1:3] for row in told(step) if row[0] == kind}
            assert len(found) == counted[token].sum()


def test_a_token_like_the_average_is_chosen():
    trace = predicting(make_trace(), 0.6)
    info = figures.timeline_info(trace, following(trace.spec, 3), HARDWARE)
    assert [step.step_ms for step in info.steps] == pytest.approx(info.mean_ms, rel=0.1)


def test_a_timeline_needs_something_fetched_ahead_and_a_token():
    trace = make_trace()
    with pytest.raises(ValueError, match="prefetches nothing, so there is nothing to compare"):
        figures.timeline_info(trace, TunedConfig.untuned(trace.spec), HARDWARE)
    with pytest.raises(ValueError, match=r"has tokens 0\.\.199; got 200"):
        figures.timeline_info(trace, following(trace.spec, 3), HARDWARE, 200)


def test_bars_are_drawn_in_two_rows_and_named_once():
    trace = one_token(predicted=1)
    hardware = replace(HARDWARE, dense_step_s=4e-3)
    figure = figures.plot_timeline(figures.timeline_info(trace, following(trace.spec, 4), hardware))
    bars = figure.data[: 2 * len(LOOKS)]
    assert [bar.name for bar in bars if bar.showlegend] == [
        "attention, router", "expert", "waiting", "on demand", "prefetched, needed",
    ]  # fmt: skip
    ends = [max([*(bar.base + bar.x), 0]) for bar in bars]
    assert max(ends[: len(LOOKS)]) == pytest.approx(14)
    assert max(ends[len(LOOKS) :]) == pytest.approx(11)
    assert [set(bar.y) for bar in bars if bar.name == "prefetched, needed"] == [set(), {3.9}]
    assert "14.0 → 11.0 ms (-21%)" in figure.layout.title.text
    assert [a.text for a in figure.layout.annotations] == [
        "<b>everything on demand</b>, 14.0 ms",
        "<b>prefetching</b>, 11.0 ms",
    ]


def test_the_gain_is_that_of_configs_in_the_same_memory():
    """Half of 24 experts: 10 slots beside the staging of 2, or 6 and a buffer of 4."""
    trace = predicting(make_trace(n_tokens=600), 0.9)
    info = figures.prefetch_gain_info(trace, HARDWARE, (2, 0.5), (0.5, 0.75))
    link = HARDWARE.at_load_ratio(trace.spec, 0.5)
    plain = TunedConfig.untuned(trace.spec)
    on_demand = simulate(trace, replace(plain, plan=replace(
        slots_plan(trace.spec, 3), slots=[4, 3, 3])), link)  # fmt: skip
    smaller = slots_plan(trace.spec, 2)
    table = plan_prefetch(trace, plan=smaller)
    ahead = simulate(trace, replace(plain, plan=smaller, prefetch=table), link)
    assert info.ms["none"][1, 0] == pytest.approx(on_demand.ms_per_token)
    assert info.ms["the next layer"][1, 0] == pytest.approx(ahead.ms_per_token)
    least = min(on_demand.ms_per_token, ahead.ms_per_token)
    assert info.saved[1, 0] == pytest.approx(1 - least / on_demand.ms_per_token)
    assert info.idle[1, 0] == pytest.approx(on_demand.link_idle_share)
    assert (info.saved_if_perfect >= info.saved).all()


def test_what_right_predictions_would_save():
    trace = predicting(make_trace(n_tokens=600), 0.7)
    right = predicting(make_trace(n_tokens=600), 1.0)
    info = figures.prefetch_gain_info(trace, HARDWARE, (1,), (0.5, 0.75))
    best = figures.prefetch_gain_info(right, HARDWARE, (1,), (0.5, 0.75))
    np.testing.assert_allclose(
        info.perfect_ms, np.minimum(best.ms["the next layer"], info.ms["none"])
    )


def test_without_room_for_a_buffer_nobody_is_followed():
    trace = predicting(make_trace(), 0.9)
    info = figures.prefetch_gain_info(trace, HARDWARE, (1,), (0.25, 0.75))
    assert info.best[0][0] == "none"
    assert info.saved[0, 0] == 0
    assert np.isnan([info.ms["the next layer"][0, 0], info.perfect_ms[0, 0]]).all()
    assert info.idle[0, 0] == info.idle_after[0, 0]


def test_a_line_per_link_and_one_per_choice():
    trace = predicting(make_trace(), 0.9)
    info = figures.prefetch_gain_info(trace, HARDWARE, (2, 0.5), (0.5, 0.75))
    figure = figures.plot_prefetch_gain(info)
    shown = [line for line in figure.data if line.showlegend]
    assert [line.name for line in shown] == ["2 × a layer", "0.5 × a layer"]
    assert shown[1].y.tolist() == info.saved[1].tolist()
    assert shown[1].customdata[:, 0].tolist() == list(info.best[1])
    choices = figures.plot_prefetch_choices(info, 0.5)
    assert [line.name for line in choices.data] == [
        "none", "the next layer", "were every prediction right",
    ]  # fmt: skip
    ratio = info.ms["the next layer"][1] / info.ms["none"][1]
    assert choices.data[1].y == pytest.approx(ratio)
    with pytest.raises(ValueError, match=r"No link of ratio 3 was tried; there are 2, 0\.5"):
        figures.plot_prefetch_choices(info, 3)


def a_report(milliseconds):
    nothing = np.zeros(3)
    passed = Traffic(nothing, nothing, 1, 0, 0, 0, nothing, nothing)
    seconds = Measurement(1e-3 * np.array(milliseconds), "s")
    return LatencyReport(seconds, seconds, seconds, passed, passed)


def test_predicted_times_are_beside_the_measured_ones():
    trace = make_trace()
    configs = [
        replace(TunedConfig.untuned(trace.spec), plan=slots_plan(trace.spec, n)) for n in (2, 4, 6)
    ]
    predicted = [simulate(trace, config, HARDWARE) for config in configs]
    slow, middle, fast = (p.ms_per_token for p in predicted)
    runs = {
        "kept": {
            "2 slots": (predicted[0], [a_report([0.5 * slow]), a_report([slow, 2 * slow])]),
            "4 slots": (predicted[1], [a_report([middle / 1.05] * 3)]),
        },
        "other": {"6 <slots>": (predicted[2], [a_report([fast])])},
    }
    info = figures.predicted_measured_info(runs)
    assert info.error == pytest.approx([0, 0.05, 0])
    assert info.spread_ms[0] == pytest.approx([0.75 * slow, 1.5 * slow])
    figure = figures.plot_predicted_measured(info)
    assert "3 configurations; median error 0%, worst 5%, rank correlation 1.00" in (
        figure.layout.title.text
    )
    kept, other = figure.data[2:]
    assert kept.x.tolist() == pytest.approx([slow, middle])
    assert kept.error_y.array == pytest.approx([0.5 * slow, 0])
    assert kept.error_y.arrayminus == pytest.approx([0.25 * slow, 0])
    assert other.text == ("6 &lt;slots&gt;",)


def test_times_that_were_not_predicted_are_refused():
    trace = make_trace()
    timeless = simulate(trace, TunedConfig.untuned(trace.spec))
    for runs in ({}, {"a kind": {"a config": (timeless, [a_report([1.0])])}}):
        with pytest.raises(
            ValueError, match="need at least one configuration, each predicted with"
        ):
            figures.predicted_measured_info(runs)
