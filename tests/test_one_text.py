"""Everything works from one short text to the end; what one text cannot tell is not known."""

import json
import math

import numpy as np
import pytest

import adapmoe_lab as lab
from adapmoe_lab.cli import main
from adapmoe_lab.policies.gating.registry import RULES
from adapmoe_lab.records import RoutingTrace, SensitivityProfile, TunedConfig
from adapmoe_lab.views import figures
from adapmoe_lab.workbench.session import Cache, Session
from adapmoe_lab.workbench.summary import tiles

TEXT = ["Once upon"]


def strict_json(path):
    def refuse(word):
        raise AssertionError(f"{path} holds {word}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("estimator", ["fisher", "directional", "second-order", "divergence"])
def test_a_sensitivity_from_one_text_has_no_errors_and_survives_its_file(
    load_tiny, tmp_path, estimator
):
    found = lab.sensitivity(load_tiny(), TEXT, estimator=estimator)
    assert found.n_sequences == 1
    for kept in (found, SensitivityProfile.load(found.save(tmp_path / "sensitivity.npz"))):
        increase, error = kept.total_increase(np.full(3, 0.6))
        assert math.isfinite(increase)
        assert error is None
        assert kept.total_increase(np.full(3, 2.0)) == (0, 0)


def test_the_whole_chain(load_tiny, tmp_path):
    model = load_tiny()
    surrogates = lab.fit_surrogates(model, TEXT, rank=1)
    predictors = lab.fit_predictors(model, TEXT)
    assert all(np.isfinite(maps).all() for maps in predictors.ridge.values())
    assert np.isfinite(predictors.last_hidden).all()
    trace = lab.profile(model, TEXT, predictors=predictors, project=tmp_path)
    assert trace.n_tokens == len(TEXT[0])
    profile = lab.sensitivity(model, TEXT, compensation=surrogates)
    config = lab.tune(
        trace,
        profile,
        lab.probe_hardware(model),
        compensation=surrogates,
        predictors=predictors,
        expert_memory="75%",
        skipped_fraction=0.2,
        model=model,
        texts=TEXT,
    )
    evidence = config.evidence
    assert evidence["measured"]["loss_increase_se"] is None
    assert evidence["predicted"]["loss_increase_se"] is None
    assert evidence["predicted_without_skipping"]["loss_increase_se"] == 0
    kept = TunedConfig.load(config.save(tmp_path / "tuned.json"))
    assert strict_json(tmp_path / "tuned.json")["evidence"]["measured"]["loss_increase_se"] is None
    assert kept.to_json() == config.to_json()
    simulation = lab.simulate(trace, kept, sensitivity=profile)
    assert simulation.loss_increase_se is None
    plain = lab.evaluate_loss(model, None, TEXT)
    increase, error = lab.evaluate_loss(model, kept, TEXT).increase_over(plain)
    assert math.isfinite(increase)
    assert error is None
    assert lab.measure_latency(model, kept, TEXT, new_tokens=2, repeats=1).decode.median > 0


def test_it_is_drawn_and_shown_as_not_known(load_tiny, tmp_path):
    model = load_tiny()
    trace = lab.profile(model, TEXT, project=tmp_path)
    profiles = lab.sensitivities(model, TEXT, ["directional", "divergence", "ablation"])
    profile = profiles["directional"]
    bench = Session(trace, profile, lab.probe_hardware(model))
    candidate = bench.candidate("uniform", 0.2, Cache(2))
    plain = lab.evaluate_loss(model, None, TEXT)
    skipping = lab.evaluate_loss(model, bench.config(candidate), TEXT)
    increase, error = skipping.increase_over(plain)
    measured = {"loss": {"increase_nats": increase, "increase_se": error}}
    loss = tiles(bench.predict(candidate), measured)[-1]
    assert loss.error == "± not known"
    assert loss.measured.endswith("± not known")
    assert TunedConfig.load(bench.export(candidate, measured).save(tmp_path / "a.json")).evidence
    rules = {name: rule(trace, profile) for name, rule in RULES.items()}
    point = figures.MeasuredPoint(1.0, (0.9, 1.1), increase, error, "it")
    curve = bench.tradeoff("uniform", candidate.cache)
    drawn = [
        figures.plot_tradeoff(figures.tradeoff_info(curve, measured=[point])),
        figures.plot_loss_by_rule(
            figures.loss_by_rule_info(rules, profile, {"uniform": [skipping]}, plain)
        ),
        figures.plot_surrogates(figures.surrogates_info({"nothing": skipping}, plain)),
        figures.plot_sensitivity(figures.sensitivity_info(profile, 0.6)),
        figures.plot_sensitivity_shares(figures.sensitivity_shares_info(profiles)),
        figures.plot_estimator_agreement(figures.estimator_agreement_info(profiles, trace)),
        figures.plot_sum_of_layers(figures.sum_of_layers_info(profiles)),
        figures.plot_predictability(figures.predictability_info(trace)),
    ]
    told = [figure.to_json() for figure in drawn]
    assert all("NaN" not in text for text in told)
    silent = [number for number, text in enumerate(told) if "not known" not in text]
    assert silent == [3]  # it shows errors as bars only


def test_every_command_that_reads_texts(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("adapmoe_lab.tuning.compare.calibration_texts", lambda: TEXT * 2)
    (tmp_path / "one.txt").write_text(TEXT[0])
    model = (str(tiny_checkpoint), "--link", "none", "--texts", "one.txt")
    assert main(["profile", *model, "--out", "trace.npz"]) == 0
    assert RoutingTrace.load(tmp_path / "trace.npz").n_tokens == len(TEXT[0])
    fitted = ("--fit-predictors", "--surrogate-memory", "4KiB", "--budget", "75%", "--verify")
    assert main(["tune", *model, *fitted]) == 0
    evidence = strict_json(tmp_path / "tuned.json")["evidence"]
    assert evidence["measured"]["loss_increase_se"] is None
    assert main(["evaluate", *model, "--config", "tuned.json"]) == 0
    again = ("--config", "tuned.json", "--new-tokens", "2", "--repeats", "1")
    assert main(["verify", *model, *again, "--out", "verify.json"]) == 0
    loss = strict_json(tmp_path / "verify.json")["checks"][-1]
    assert loss["values"]["increase_se"] is None
    bench = ("--new-tokens", "2", "--rounds", "1", "--skipped-fraction", "0.2")
    targets = ("--targets", "mixtral-8x7b-int4/pcie4-x16")
    capsys.readouterr()
    assert main(["bench", *model, *bench, *targets, "--out", "bench.json"]) == 0
    assert "± not known" in capsys.readouterr().out
    assert strict_json(tmp_path / "bench.json")["rows"][0]["loss_increase_se"] is None
