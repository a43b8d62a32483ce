"""What the workbench's controls say and what follows from it."""

from dataclasses import replace

import pytest
from traces import make_sensitivity, make_trace

from adapmoe_lab.records import HardwareProfile, TunedConfig
from adapmoe_lab.workbench.session import Cache, Session


@pytest.fixture
def bench():
    trace = make_trace(n_tokens=600)
    sensitivity = make_sensitivity(trace.spec, [3.0, 2.0, 1.0])
    hardware = HardwareProfile("cpu", "emulated:x", [1000], [0.01], 0.001, 0.0005)
    return Session(trace, sensitivity, hardware)


def test_no_skipping_and_every_slot_costs_nothing(bench):
    prediction = bench.predict(bench.candidate("uniform", 0.0, Cache(8)))
    assert prediction.skipped_fraction == 0
    assert prediction.loss_increase_nats == 0
    assert bench.config(bench.candidate("uniform", 0.0, Cache(8))).gating is None


@pytest.mark.parametrize("method", ["uniform", "adapmoe", "curve"])
def test_a_rule_meets_the_asked_fraction(bench, method):
    prediction = bench.predict(bench.candidate(method, 0.2, Cache(4)))
    assert prediction.skipped_fraction == pytest.approx(0.2, abs=0.01)
    assert prediction.ms_per_token < bench.without_skipping(Cache(4)).ms_per_token


def test_the_suggestion_stays_within_one_percent_of_perplexity(bench):
    prediction = bench.predict(bench.suggestion("uniform", Cache(4)))
    assert 0.002 < prediction.loss_increase_nats <= 0.01


def test_quick_predictions_resemble_full_ones(bench):
    candidate = bench.candidate("uniform", 0.2, Cache(4))
    quick, full = bench.predict(candidate, quick=True), bench.predict(candidate)
    assert quick.mean_hit_rate == pytest.approx(full.mean_hit_rate, abs=0.1)


def test_the_tradeoff_runs_from_nothing_to_one_expert(bench):
    points = bench.tradeoff("uniform", Cache(4))
    skipped = [point.skipped_fraction for point in points]
    assert skipped[0] == 0
    assert skipped[-1] == pytest.approx(0.5, abs=0.01)
    times = [point.ms_per_token for point in points]
    assert times == sorted(times, reverse=True)


def test_equal_settings_have_equal_keys_however_reached(bench):
    candidate = bench.candidate("uniform", 0.2, Cache(4))
    by_hand = type(candidate)(candidate.cuts.copy(), Cache(4), "by hand")
    assert candidate.key == by_hand.key
    assert candidate.key != bench.candidate("uniform", 0.2, Cache(5)).key


def test_an_export_says_what_was_measured(bench, tmp_path):
    candidate = bench.candidate("uniform", 0.2, Cache(4))
    predicted = bench.export(candidate, {})
    assert predicted.evidence["verified"] is False
    measured = bench.export(candidate, {"loss": {"increase_nats": 0.01}})
    assert measured.evidence["verified"] is True
    path = measured.save(tmp_path / "tuned.json")
    assert TunedConfig.load(path).evidence["measured"] == {"loss": {"increase_nats": 0.01}}


def test_what_is_fetched_ahead_is_in_config_and_prediction(bench):
    assert bench.max_layers_ahead == 1
    alone, ahead = (bench.candidate("uniform", 0.2, Cache(4, layers)) for layers in (0, 1))
    assert bench.config(alone).prefetch is None
    table = bench.config(ahead).prefetch
    assert [(s.predictor, s.distance) for s in table.sources] == [("next_router", 1)]
    used = bench.predict(ahead).prefetch_used_per_token
    assert used.sum() > 0 == bench.predict(alone).prefetch_used_per_token.sum()
    assert alone.key != ahead.key
    assert bench.without_skipping(ahead.cache).prefetch_used_per_token.sum() > 0


def test_a_trace_recorded_while_experts_were_skipped_is_refused(bench):
    gated = replace(make_trace(), recorded_under="abc")
    with pytest.raises(ValueError, match="Profile with nothing skipped"):
        Session(gated, bench.sensitivity, bench.hardware)
