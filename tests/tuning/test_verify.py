"""Verifying a model: each check against something broken, and the record it leaves."""

import json
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch
from checkpoints import save_tiny_mixtral
from quantised_checkpoints import save_fp8_deepseek, save_mxfp4_gpt_oss
from runs import half_cached
from tiny_models import save_tiny

import adapmoe_lab as lab
from adapmoe_lab.engine.memory_plan import FreeMemory
from adapmoe_lab.engine.transfer.clock import VirtualClock
from adapmoe_lab.evaluation import exactness
from adapmoe_lab.models.support import causal_families
from adapmoe_lab.policies.allocation.slots import shared, slots_plan
from adapmoe_lab.records import (
    GatingTable,
    HardwareProfile,
    Measurement,
    PrefetchSource,
    PrefetchTable,
    RecordError,
    TunedConfig,
)
from adapmoe_lab.records.verify_report import Check, VerifyReport
from adapmoe_lab.tuning.verify import timing, verify
from adapmoe_lab.tuning.verify.counters import check_executor
from adapmoe_lab.tuning.verify.decoded import record_decode
from adapmoe_lab.tuning.verify.timing import check_prediction

CHECKS = ["exactness", "executor", "speed", "prediction", "loss"]
HARDWARE = HardwareProfile("cpu", "none", [1000], [1e-5], 1e-3, 1e-4)
QUICKLY = {"new_tokens": 6, "repeats": 1}


@pytest.fixture
def unprobed(monkeypatch):
    """Leave out what takes seconds and has tests of its own."""
    monkeypatch.setattr(verify, "probe_hardware", lambda _: HARDWARE)


def skipping(model, cut=0.6):
    config = replace(TunedConfig.untuned(model.spec), plan=slots_plan(model.spec, 2))
    return replace(config, gating=GatingTable.per_layer([cut] * model.spec.n_layers, 2))


def strict_json(path):
    def refuse(word):
        raise AssertionError(f"{path} holds {word}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_sound_model_passes_and_its_record_says_under_what(load_tiny, texts, tmp_path):
    model = half_cached(load_tiny())
    before, told = model.config, []
    report = lab.verify(model, None, texts, **QUICKLY, progress=lambda *how: told.append(how))
    assert [check.name for check in report.checks] == CHECKS
    assert [report[name].verdict for name in ("exactness", "executor", "speed", "loss")] == [
        "passed", "passed", "measured", "passed",
    ]  # fmt: skip
    assert model.config is before
    assert report["exactness"].values["reference"] == "the unmodified model"
    assert len(report["exactness"].values["errors"]) == sum(map(len, texts)) + 6
    counted = report["executor"].values["counted"]
    assert counted["kept"] == sum(min(len(text), 32) + 5 for text in texts) * 3 * 2
    assert sum(counted["misses"]) > 0
    decode = Measurement.from_json(report["speed"].values["latency"]["decode"])
    assert report["speed"].values["decode"]["median_ms"] == pytest.approx(1e3 * decode.median)
    predicted = report["prediction"].values
    assert predicted["measured_ms_per_token"] == [pytest.approx(1e3 * decode.median)]
    (predicted_ms,), (measured_ms,) = (
        predicted[f"{kind}_ms_per_token"] for kind in ("predicted", "measured")
    )
    assert predicted["error"] == pytest.approx(predicted_ms / measured_ms - 1)
    assert predicted["bound"] == 0.1
    plain = lab.evaluate_loss(model, TunedConfig.untuned(model.spec), texts)
    assert report["loss"].values["nats_per_token"] == plain.nats_per_token
    assert report["loss"].values["increase_nats"] == 0
    for text in ("comparing logits", "recording routing", "probing", "latency", "measuring loss"):
        assert any(text in how[2] for how in told), text

    kept = VerifyReport.load(report.save(tmp_path / "verify.json"))
    assert kept.to_json() == report.to_json() == strict_json(tmp_path / "verify.json")
    assert kept.table() == report.table()
    assert kept.conditions["versions"]["torch"] == torch.__version__
    assert kept.conditions["versions"]["transformers"] == version("transformers")
    named = kept.conditions["model"]
    assert (named["fingerprint"], named["family_class"]) == (model.spec.fingerprint(), "exact")
    assert str(model.hf.name_or_path) not in (tmp_path / "verify.json").read_text()
    assert kept.conditions["measured_under"]["device"].startswith("CPU")
    assert kept.conditions["config"]["slots"] == 6


def test_the_demo_is_the_unmodified_model_in_its_own_precision(unprobed):
    model = lab.load("demo", device="cpu", link="none", announce=lambda _: None)
    texts = [text[:200] for text in lab.calibration_texts()[:2]]
    report = lab.verify(half_cached(model), texts=texts, new_tokens=4, repeats=1)
    assert (report["exactness"].verdict, report["executor"].verdict) == ("passed", "passed")
    assert report["exactness"].values["bound"] == 8 * 2**-8
    assert report.conditions["model"]["name"] == "demo"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_altered_weight_of_one_expert_is_not_exact(load_tiny, texts, dtype, unprobed):
    model = load_tiny(dtype=dtype)
    next(iter(model.store.views(1, 2, model.store.buffer(1, 2)).values()))[0, 0] += 8
    report = lab.verify(model, None, texts, **QUICKLY)
    assert "exactness" in report.failed
    errors = np.array(report["exactness"].values["errors"])
    assert (errors > report["exactness"].values["bound"]).any()
    assert report["executor"].verdict == "passed"


def test_an_expert_that_is_not_finite_fails_and_can_be_saved(load_tiny, texts, tmp_path, unprobed):
    model = load_tiny()
    for weights in model.store.views(1, 2, model.store.buffer(1, 2)).values():
        weights.fill_(torch.nan)
    report = lab.verify(model, None, texts, **QUICKLY)
    assert {"exactness", "loss"} <= set(report.failed)
    assert "largest error not finite" in report["exactness"].found
    assert "The loss of 3 of 3 texts is not finite" in report["loss"].found
    report.save(tmp_path / "verify.json")
    assert None in strict_json(tmp_path / "verify.json")["checks"][0]["values"]["errors"]


@pytest.mark.parametrize("save", [save_fp8_deepseek, save_mxfp4_gpt_oss])
def test_quantised_checkpoints_are_compared_with_what_is_stored(tmp_path, texts, save, unprobed):
    packed, _ = save(tmp_path)
    model = lab.load(packed, dtype="float32", device="cpu", link="none")
    report = lab.verify(model, None, texts[:1], **QUICKLY)
    assert report["exactness"].verdict == "passed"
    assert report["exactness"].values["reference"].endswith("the stored experts, dequantised")


def test_packed_experts_are_compared_with_themselves_dequantised(load_tiny, texts, unprobed):
    model = load_tiny(expert_dtype="int4", expert_memory="60%")
    report = lab.verify(model, None, texts, **QUICKLY)
    assert (report["exactness"].verdict, report["executor"].verdict) == ("passed", "passed")
    assert "stored experts, dequantised" in report["exactness"].found


def test_what_does_not_fit_is_not_known(load_tiny, texts, monkeypatch, unprobed):
    model = load_tiny()
    monkeypatch.setattr(exactness, "free_memory", lambda _: FreeMemory(2**30, 2**16))
    report = lab.verify(model, None, texts, **QUICKLY)
    check = report["exactness"]
    assert (check.verdict, dict(check.values)) == ("not known", {})
    assert check.found.startswith("the plain model takes 0.")
    assert (
        "MiB beside this one, the host has 0.0MiB free; give a smaller expert_memory" in check.found
    )
    assert "exactness" not in report.failed


def test_a_checkpoint_that_is_gone_cannot_be_compared_with(tmp_path, texts, unprobed):
    folder = save_tiny_mixtral(tmp_path / "there")
    model = lab.load(folder, device="cpu", link="none")
    folder.rename(tmp_path / "gone")
    report = lab.verify(model, None, texts[:1], **QUICKLY)
    assert report["exactness"].verdict == "not known"
    assert "No such file or directory" in report["exactness"].found
    assert not report.failed


def test_a_family_that_cannot_be_profiled_is_compared_and_timed(tmp_path, texts):
    if "gemma4_text" not in causal_families():
        pytest.skip("this transformers does not have it")
    folder = save_tiny("gemma4_text", tmp_path)
    model = lab.load(folder, dtype="float32", device="cpu", link="none")
    report = lab.verify(model, None, texts[:1], **QUICKLY)
    assert [check.verdict for check in report.checks] == [
        "passed", "not known", "measured", "not known", "passed",
    ]  # fmt: skip
    assert "can be served, but not profiled" in report["executor"].found
    assert report["prediction"].found == report["executor"].found


@pytest.mark.parametrize(
    ("evidence", "verdict", "bound"),
    [
        ({}, "measured", ""),
        ({"predicted": {"loss_increase_nats": None}}, "measured", ""),
        ({"predicted": {"loss_increase_nats": 9.0}}, "passed", "promised +9.0000 ± not known"),
        (
            {"predicted": {"loss_increase_nats": 9.0}, "measured": {"loss_increase_nats": -9.0}},
            "not known",
            "promised -9.0000 ± not known",
        ),
        (
            {"measured": {"loss_increase_nats": -9.0, "loss_increase_se": 1e-4}},
            "failed",
            "promised -9.0000 ± 0.0001",
        ),
        (
            {"measured": {"loss_increase_nats": -9.0, "loss_increase_se": 9.0}},
            "passed",
            "promised -9.0000 ± 9.0000",
        ),
    ],
)
def test_a_config_that_skips_is_held_to_its_evidence(
    load_tiny, texts, unprobed, evidence, verdict, bound
):
    model = load_tiny()
    config = replace(skipping(model), evidence=evidence)
    report = lab.verify(model, config, texts, **QUICKLY)
    loss = report["loss"]
    assert (loss.verdict, loss.bound) == (verdict, bound)
    plain = lab.evaluate_loss(model, TunedConfig.untuned(model.spec), texts)
    increase, error = lab.evaluate_loss(model, config, texts).increase_over(plain)
    assert (loss.values["increase_nats"], loss.values["increase_se"]) == (increase, error)
    assert increase != 0
    assert report["exactness"].verdict == "passed", "it is compared with nothing skipped"
    assert report["executor"].verdict == "passed"
    assert report["executor"].values["counted"]["skipped"] > 0


@pytest.mark.parametrize("is_global", [False, True])
def test_what_is_prefetched_is_counted_as_missing(load_tiny, texts, unprobed, is_global):
    model = load_tiny()
    table = PrefetchTable([PrefetchSource("next_router", 1, np.full((3, 2), 0.9))], 2)
    config = replace(skipping(model), prefetch=table, eviction="lfu_aged")
    config = replace(config, plan=shared(config.plan)) if is_global else config
    report = lab.verify(model, config, texts, **QUICKLY)
    assert (report["exactness"].verdict, report["executor"].verdict) == ("passed", "passed")
    assert report["executor"].bound == "a replay's hits, misses, kept, skipped"
    assert min(report["prediction"].values["predicted_ms_per_token"]) > 0


def test_counters_that_are_not_the_replays_fail_by_name(load_tiny, texts):
    model = half_cached(load_tiny())
    prompts = [model.encode(text)[:16] for text in texts]
    decoded = record_decode(model, model.config, prompts, 6)
    assert check_executor(decoded).verdict == "passed"
    traffic = decoded.traffic
    wrong = replace(traffic, hits=traffic.hits + 1, bytes_moved=traffic.bytes_moved + 1)
    check = check_executor(replace(decoded, traffic=wrong))
    assert check.verdict == "failed"
    assert check.found.endswith("replayed otherwise: hits, bytes")


def test_recording_holds_up_no_emulated_link(load_tiny, texts):
    model = half_cached(load_tiny(clock=VirtualClock()))
    model.link.bytes_per_s = 1.0
    before = model.engine.clock.now()
    record_decode(model, model.config, [model.encode(texts[0])[:16]], 6)
    assert model.engine.clock.now() == before


def test_what_is_predicted_misses_what_is_measured_to_miss(load_tiny, texts):
    """Prompts are replayed in one step each, as they are run, and the first one twice."""
    model = half_cached(load_tiny())
    prompts = [model.encode(text)[:32] for text in texts]
    trace = record_decode(model, model.config, prompts, 6).trace
    priced = replace(HARDWARE, miss_s=1.0, layer_host_s=0.0)
    without = replace(priced, miss_s=0.0)
    seconds = [timing.predicted_s(trace, model.effective_config, one) for one in (priced, without)]
    measured = lab.measure_latency(model, None, texts, new_tokens=6, repeats=1).decode_traffic
    counted = 5 * (seconds[0] - seconds[1]).sum()
    np.testing.assert_allclose(counted, measured.misses.sum(), rtol=1e-3)  # a miss hides its copy
    assert measured.misses.sum() > 0


@pytest.mark.parametrize(
    ("predicted", "measured", "error", "verdict"),
    [
        ((1.09, 1.09, 1.09), (1.0, 1.0), 0.09, "passed"),
        ((1.0, 2.0, 3.0), (1.5, 2.5), 0.0, "passed"),
        ((1.11, 1.11, 1.11), (1.0, 1.0), 0.11, "failed"),
        ((0.89, 0.89, 0.89), (1.0, 1.0), -0.11, "failed"),
        ((1.0, 1.0, 1.0), (1.0, 1.2), -1 / 12, "not known"),
        ((1.5, 1.5, 1.5), (1.0, 1.2), 0.375, "not known"),
        ((1.05, 1.05), (1.0,), 0.05, "not known"),
    ],
)
def test_a_prediction_is_held_to_its_bound_where_the_rounds_agree(
    load_tiny, monkeypatch, predicted, measured, error, verdict
):
    model = load_tiny()
    report = lab.measure_latency(model, None, ["Once", "upon"], new_tokens=2, repeats=1)
    rounds = [replace(report, decode=Measurement([s, s], "s")) for s in measured]
    times = iter(predicted)
    monkeypatch.setattr(timing, "predicted_s", lambda *_: np.full(2, next(times)))
    check = check_prediction(None, model.config, rounds, [HARDWARE] * len(predicted))
    assert (check.verdict, check.values["error"]) == (verdict, pytest.approx(error, abs=1e-12))
    assert (check.values["spread"] is None) == (len(measured) == 1)


def test_of_steps_that_take_no_time_nothing_is_predicted(load_tiny, texts, unprobed):
    model = load_tiny(clock=VirtualClock())
    report = lab.verify(model, None, texts[:1], **QUICKLY)
    assert (report["prediction"].verdict, report["prediction"].found) == (
        "not known",
        "decoding took no time",
    )
    assert not report.failed


def test_predicted_is_what_the_costs_add_up_to(load_tiny, texts):
    """With every expert there each step takes its layers, its experts and its head."""
    model = load_tiny()
    prompts = [model.encode(text)[:32] for text in texts]
    trace = record_decode(model, model.effective_config, prompts, 6).trace
    hardware = replace(HARDWARE, copy_s=np.array([0.0]))
    costs = hardware.step_costs(model.spec.precision)
    expected = 3 * costs.host.dense_layer_s + 6 * costs.expert_s.mean() + costs.host.head_s
    found = timing.predicted_s(trace, model.effective_config, hardware)
    np.testing.assert_allclose(found, [expected] * 3)


def test_one_short_text_is_enough(load_tiny, tmp_path, unprobed):
    model = load_tiny()
    report = lab.verify(model, skipping(model, 0.9), ["On"], new_tokens=2, repeats=1)
    assert not report.failed
    assert report["loss"].values["increase_se"] is None
    assert "± not known" in report.table()
    report.save(tmp_path / "verify.json")
    assert strict_json(tmp_path / "verify.json")["checks"][4]["values"]["increase_se"] is None


@pytest.mark.parametrize("during", ["comparing", "recording", "probing", "latency", "loss"])
def test_an_interrupt_leaves_the_model_as_it_was(load_tiny, texts, unprobed, during):
    model = half_cached(load_tiny())
    before = model.config

    def stop(done, total, text):
        if during in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.verify(model, skipping(model), texts, **QUICKLY, progress=stop)
    assert model.config is before
    assert model.generate("Once", 4) == half_cached(load_tiny()).generate("Once", 4)


def test_a_config_of_another_model_is_refused_before_the_work(load_tiny, texts):
    model = load_tiny()
    config = model.config
    other = replace(config, model={**config.model, "fingerprint": "0", "partial_fingerprint": "0"})
    with pytest.raises(RecordError, match="tuned for"):
        lab.verify(model, other, texts, progress=lambda *_: pytest.fail("the work had begun"))


def test_a_check_is_asked_for_by_name():
    report = VerifyReport((Check("speed", "measured", "1 ms"),), {})
    assert report["speed"].found == "1 ms"
    with pytest.raises(KeyError, match="no check 'spede'; there are speed"):
        report["spede"]


def test_what_is_not_timed_costs_no_other_check(load_tiny, texts, unprobed, monkeypatch):
    def gone(*_, **__):
        raise OSError("the file is gone")

    monkeypatch.setattr(verify, "measure_latency", gone)
    report = lab.verify(load_tiny(), texts=texts, **QUICKLY)
    assert (report["speed"].verdict, report["speed"].found) == ("not known", "the file is gone")
    assert report["prediction"].found == "nothing was measured: the file is gone"
    assert report["loss"].verdict == "passed"
