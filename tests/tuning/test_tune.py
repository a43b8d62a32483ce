"""From trace and sensitivity to a config that keeps its promises."""

import io
import zipfile
from dataclasses import replace

import pytest
from traces import make_sensitivity, make_spec, make_trace

from adapmoe_lab.evaluation.loss import evaluate_loss
from adapmoe_lab.policies.allocation.slots import N_STAGING, uniform_plan
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.policies.gating.registry import RULES
from adapmoe_lab.profiling.routing.profile import profile
from adapmoe_lab.profiling.sensitivity.sensitivity import sensitivity
from adapmoe_lab.profiling.surrogates.fit import fit_surrogates
from adapmoe_lab.records import HardwareProfile, TunedConfig
from adapmoe_lab.simulation.simulate import simulate
from adapmoe_lab.tuning.tune import tune


def sensitivity_of(trace):
    return make_sensitivity(trace.spec, [3.0, 2.0, 1.0])


@pytest.mark.parametrize("method", RULES)
def test_the_predicted_loss_stays_within_what_is_allowed(method):
    trace = make_trace(n_tokens=800)
    config = tune(trace, sensitivity_of(trace), max_loss_increase_nats=0.01, method=method)
    predicted = config.evidence["predicted"]
    assert 0 < predicted["loss_increase_nats"] <= 0.01
    assert predicted["skipped_fraction"] > 0.05
    assert config.evidence["verified"] is False
    without = config.evidence["predicted_without_skipping"]
    assert without["skipped_fraction"] == 0
    assert predicted["bytes_per_token"] < without["bytes_per_token"]


def test_a_larger_allowance_never_skips_less():
    trace = make_trace(n_tokens=800)
    fractions = [
        tune(trace, sensitivity_of(trace), max_loss_increase_nats=nats).evidence["predicted"][
            "skipped_fraction"
        ]
        for nats in (0.0, 0.001, 0.01, 1.0)
    ]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert fractions[-1] == pytest.approx(0.5, abs=0.01)


def test_slots_come_from_the_memory_budget():
    trace = make_trace()
    config = tune(trace, sensitivity_of(trace), expert_memory="50%", skipped_fraction=0.1)
    assert config.plan.n_slots == 12 - 2  # half of 24 experts, two slots for staging
    kept = kept_experts(trace, config.gating)
    assert 1 - kept.mean() == pytest.approx(0.1, abs=0.01)


def test_slots_and_eviction_are_what_loads_least_in_the_replay():
    trace = make_trace(n_tokens=800)
    experts = trace.expert_indices.copy()
    experts[:, 0] = [0, 1]  # this layer needs two slots, whatever comes
    trace = replace(trace, expert_indices=experts)
    config = tune(trace, sensitivity_of(trace), expert_memory="50%", skipped_fraction=0.1)
    evidence = config.evidence["residency"]
    loads = evidence["loads_per_token"]
    assert loads[f"{evidence['slots']}, {evidence['eviction']}"] == min(loads.values())
    assert min(loads.values()) < 0.9 * loads["uniform, lru"]
    assert evidence["slots"] == config.plan.method == "measured"
    assert evidence["eviction"] == config.eviction
    assert config.plan.slots[0] == 2
    assert config.plan.n_slots == 10
    lru = replace(config, plan=uniform_plan(trace.spec, 12_000), eviction="lru")
    bytes_of_lru = simulate(trace, lru).bytes_per_token
    assert config.evidence["predicted"]["bytes_per_token"] < bytes_of_lru


def test_nothing_beats_lru_where_all_experts_fit():
    trace = make_trace()
    config = tune(trace, sensitivity_of(trace), expert_memory=None)
    assert (config.eviction, config.plan.method) == ("lru", "uniform")


def test_verifying_measures_and_keeps_the_promise(load_tiny, texts, tmp_path):
    model = load_tiny()
    trace = profile(model, texts, project=tmp_path)
    measured = sensitivity(model, texts)
    config = tune(
        trace, measured, max_loss_increase_nats=0.002, model=model, texts=texts, expert_memory="60%"
    )
    baseline = evaluate_loss(model, TunedConfig.untuned(model.spec), texts)
    increase, _ = evaluate_loss(model, config, texts).increase_over(baseline)
    assert increase <= 0.002
    assert config.evidence["verified"] is True
    assert config.evidence["measured"]["loss_increase_nats"] == pytest.approx(increase)
    assert TunedConfig.load(config.save(tmp_path / "tuned.json")).to_json() == config.to_json()


def test_surrogates_are_tuned_verified_and_saved_with_the_config(load_tiny, texts, tmp_path):
    model = load_tiny()
    surrogates = fit_surrogates(model, texts, rank=2)
    trace = profile(model, texts, project=tmp_path)
    measured = sensitivity(model, texts, compensation=surrogates)
    config = tune(
        trace, measured, skipped_fraction=0.2, compensation=surrogates, model=model, texts=texts
    )
    assert config.compensation is surrogates
    assert config.evidence["predicted"]["loss_increase_nats"] > 0
    with zipfile.ZipFile(io.BytesIO(config.as_one_file())) as archive:
        archive.extractall(tmp_path)
    again = TunedConfig.load(tmp_path / "tuned.json")
    assert again.compensation.fingerprint() == surrogates.fingerprint()
    with pytest.raises(ValueError, match="with nothing in place of skipped experts; the config"):
        tune(trace, sensitivity(model, texts), skipped_fraction=0.2, compensation=surrogates)


def test_what_it_refuses():
    trace = make_trace()
    with pytest.raises(ValueError, match="method='magic' is unknown; expected one of uniform"):
        tune(trace, sensitivity_of(trace), method="magic")
    single = make_trace(make_spec(top_k=1))
    with pytest.raises(ValueError, match="routes every token to one expert, so none can be skipp"):
        tune(single, sensitivity_of(single))
    other = make_trace(make_spec(n_experts=4))
    with pytest.raises(ValueError, match="The sensitivity was measured on a model, fingerprint"):
        tune(other, sensitivity_of(trace))
    with pytest.raises(
        ValueError, match=r"skipped \(gating abc\)\. Profile with nothing skipped: "
    ):
        tune(replace(trace, recorded_under="abc"), sensitivity_of(trace))


def test_fetching_ahead_is_taken_where_it_is_predicted_to_pay():
    trace, profile_of = make_trace(n_tokens=600), make_sensitivity()
    quick = HardwareProfile("cpu", "emulated:x", [500, 2000], [0.0005, 0.002], 0.006, 0.0005)
    ahead = tune(trace, profile_of, quick, expert_memory="75%", skipped_fraction=0.0)
    alone = tune(
        trace, profile_of, quick, expert_memory="75%", skipped_fraction=0.0, prefetch=False
    )
    assert alone.prefetch is None
    assert alone.evidence["prefetch"] is None
    times = ahead.evidence["prefetch"]
    assert times["none"] == alone.evidence["predicted"]["ms_per_token"]
    assert ahead.evidence["predicted"]["ms_per_token"] == min(times.values()) < times["none"]
    room = ahead.prefetch.n_bytes(1000) + (ahead.plan.n_slots + N_STAGING) * 1000
    assert room <= 0.75 * trace.spec.all_experts_bytes
    assert ahead.plan.n_slots < alone.plan.n_slots
    unmeasured = tune(trace, profile_of, skipped_fraction=0.0)
    assert unmeasured.prefetch is None
    costly = tune(trace, profile_of, replace(quick, predict_s=0.005), skipped_fraction=0.0)
    assert costly.prefetch is None
    replayed = replace(quick, conditions={"executor": "graph"})
    captured = tune(trace, profile_of, replayed, expert_memory="75%", skipped_fraction=0.0)
    assert captured.prefetch is None, "captured steps prefetch nothing"
    assert set(captured.evidence["prefetch"]) == {"none"}


def test_fetching_ahead_is_left_out_where_there_is_no_room_for_it():
    trace, profile_of = make_trace(n_tokens=600), make_sensitivity()
    hardware = HardwareProfile("cpu", "emulated:x", [500, 2000], [0.0005, 0.002], 0.006, 0.0005)
    tight = tune(trace, profile_of, hardware, expert_memory=6000, skipped_fraction=0.0)
    assert tight.prefetch is None
    assert tight.plan.n_slots == 4
