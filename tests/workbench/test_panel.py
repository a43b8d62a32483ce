"""The workbench without a browser: controls, predictions, measurements and export."""

import re
from dataclasses import replace

import numpy as np
import pytest
from traces import make_sensitivity, make_spec, make_trace

from adapmoe_lab.profiling.hardware.probe import probe_hardware
from adapmoe_lab.profiling.routing.profile import profile
from adapmoe_lab.profiling.sensitivity.sensitivity import sensitivity
from adapmoe_lab.records import OFF, GatingTable, Surrogates, TunedConfig
from adapmoe_lab.simulation.simulate import Simulation
from adapmoe_lab.workbench import panel as panel_module
from adapmoe_lab.workbench.panel import Workbench
from adapmoe_lab.workbench.summary import as_html, tiles

WAIT_S = 60


@pytest.fixture
def workbench(load_tiny, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load_tiny()
    trace, measured = profile(model, texts), sensitivity(model, texts)
    panel = Workbench(model, trace, measured, probe_hardware(model, n_steps=6), texts=texts)
    panel.controls.budget.value = 0.0
    assert panel.wait(WAIT_S)
    yield panel
    panel.close()


def shown(panel):
    """Return the tiles' predicted and measured texts by name."""
    found = re.findall(
        r'data-tile="([^"]+)".*?class="predicted">([^<]+).*?class="measured[^"]*">([^<]+)<',
        panel.summary.value,
    )
    return {name: (predicted.strip(), measured) for name, predicted, measured in found}


def test_a_slider_moves_the_curve_the_tiles_and_the_plots(workbench):
    before = shown(workbench)
    assert before["Skipped"] == ("0.0%", "not measured")
    bars = np.array(workbench.layers_figure.figure.data[0].y)
    workbench.controls.budget.value = 0.25
    assert workbench.wait(WAIT_S)
    assert shown(workbench)["Skipped"][0] == "25.0%"
    assert (np.array(workbench.layers_figure.figure.data[0].y) < bars).all()
    assert all(cut < OFF for cut in workbench.controls.curve.values)
    assert workbench.error.value == ""


def test_the_curve_moves_the_slider(workbench):
    curve = workbench.controls.curve
    curve.values = [0.5, OFF, OFF]
    assert workbench.wait(WAIT_S)
    assert workbench.controls.budget.value == pytest.approx(1 / 6, abs=0.01)
    assert workbench.controls.candidate.chosen_by == "by hand"
    assert shown(workbench)["Skipped"][0] == "16.7%"


def test_a_slider_that_sends_its_rounded_value_back_does_not_undo_the_curve(workbench):
    workbench.controls.curve.values = [0.55, OFF, OFF]
    echoed = workbench.controls.budget.value
    workbench.controls.budget.value = echoed + 1e-4
    assert workbench.controls.candidate.chosen_by == "by hand"
    workbench.controls.budget.value = echoed + 0.01
    assert workbench.controls.candidate.chosen_by == "uniform"


def test_more_slots_raise_the_hit_rate(workbench):
    workbench.controls.slots.value = 1
    assert workbench.wait(WAIT_S)
    low = shown(workbench)["Hit rate"][0]
    workbench.controls.slots.value = 4
    assert workbench.wait(WAIT_S)
    assert float(low[:-1]) < float(shown(workbench)["Hit rate"][0][:-1]) == 100
    assert "100% of all experts" in workbench.controls.memory.value


def test_measured_values_stand_beside_their_own_setting_only(workbench):
    workbench.controls.budget.value = 0.2
    for job in (workbench.latency_job, workbench.loss_job):
        job.start()
        assert job.wait(WAIT_S)
        assert job.state == "done", job.error
    assert workbench.wait(WAIT_S)
    assert all(measured.startswith("measured ") for _, measured in shown(workbench).values())
    workbench.controls.budget.value = 0.3
    assert workbench.wait(WAIT_S)
    assert all(measured == "not measured" for _, measured in shown(workbench).values())
    workbench.controls.budget.value = 0.2
    assert workbench.wait(WAIT_S)
    assert shown(workbench)["Loss, millinats"][1].startswith("measured ")


def test_a_cancelled_measurement_leaves_the_model_as_it_was(workbench):
    workbench.loss_job.start()
    workbench.loss_job.cancel()
    assert workbench.loss_job.wait(WAIT_S)
    assert workbench.loss_job.state in ("cancelled", "done")
    workbench.latency_job.start()
    assert workbench.latency_job.wait(WAIT_S)
    assert workbench.latency_job.state == "done"


def test_an_export_reads_back_and_says_what_it_replaced(workbench, tmp_path):
    workbench.controls.budget.value = 0.2
    assert workbench.wait(WAIT_S)
    workbench.save_button.click()
    assert "Saved <code>tuned.json</code>" in workbench.saved.value
    assert TunedConfig.load(tmp_path / "tuned.json").to_json() == workbench.config.to_json()
    assert workbench.download_button.content == (tmp_path / "tuned.json").read_bytes()
    workbench.save_button.click()
    assert "Replaced" in workbench.saved.value


def test_an_export_that_fails_is_shown(workbench, tmp_path):
    (tmp_path / "folder").mkdir()
    workbench.file_name.value = "folder"
    workbench.save_button.click()
    assert "Error" in workbench.error.value
    assert workbench.saved.value == ""


def test_the_present_setting_is_the_config(workbench):
    assert workbench.config.gating is None
    workbench.controls.budget.value = 0.25
    assert workbench.config.gating is not None
    assert workbench.config_without_skipping.gating is None
    assert workbench.config_without_skipping.plan.n_slots == workbench.config.plan.n_slots


def test_tiles_of_what_was_not_predicted_show_a_dash():
    spec = make_spec()
    ones = np.ones(spec.n_layers)
    rendered = as_html(tiles(Simulation(ones, 0.5, ones, ones, 0.0, 0 * ones, 0 * ones), {}))
    assert rendered.count("–") == 2


@pytest.fixture
def idle(load_tiny, monkeypatch):
    """Return a model that must not be measured."""
    for name in ("profile", "measure_sensitivity", "probe_hardware"):
        monkeypatch.setattr(panel_module, name, lambda *_, **__: pytest.fail("the work had begun"))
    return load_tiny()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"trace": make_trace()}, "The trace was recorded on 'synthetic', fingerprint"),
        ({"sensitivity": make_sensitivity()}, "The sensitivity was measured on a model, finger"),
        (
            {"compensation": Surrogates.scaling(make_spec(), 0.5)},
            "The surrogates were fitted to a model, fingerprint",
        ),
        ({"texts": ["Once upon a time", ""]}, "text 1 is shorter"),
    ],
)
def test_what_is_of_another_model_or_too_short_is_refused_before_the_work(idle, given, told):
    with pytest.raises(ValueError, match=told):
        Workbench(idle, **given)


def test_a_trace_recorded_while_experts_were_skipped_is_refused_before_the_work(idle):
    trace = replace(make_trace(idle.spec), recorded_under="abc")
    with pytest.raises(ValueError, match="Profile with nothing skipped"):
        Workbench(idle, trace)


def test_a_single_expert_is_refused_before_the_work(idle, monkeypatch):
    monkeypatch.setattr(idle, "spec", replace(idle.spec, top_k=1))
    with pytest.raises(ValueError, match="routes every token to one expert"):
        Workbench(idle)


def test_a_model_that_skips_is_profiled_with_nothing_skipped(
    load_tiny, texts, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(panel_module, "calibration_texts", lambda: [*texts, *texts])
    model = load_tiny()
    config = TunedConfig.untuned(model.spec)
    model.apply(replace(config, gating=GatingTable.per_layer([0.6] * model.spec.n_layers, 2)))
    before, traces = model.config.fingerprint(), []

    def kept(*given):
        traces.append(profile(*given))
        return traces[-1]

    monkeypatch.setattr(panel_module, "profile", kept)
    hardware = probe_hardware(model, n_steps=6)
    panel = Workbench(model, sensitivity=sensitivity(model, texts), hardware=hardware)
    assert [trace.recorded_under for trace in traces] == ["ungated"]
    assert panel.wait(WAIT_S)
    panel.close()
    assert model.config.fingerprint() == before
