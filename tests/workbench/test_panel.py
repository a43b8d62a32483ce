"""The workbench without a browser: controls, predictions, measurements and export."""

import re

import numpy as np
import pytest
from traces import make_spec

from adapmoe_lab.engine.hardware import probe_hardware
from adapmoe_lab.profiling.routing import profile
from adapmoe_lab.profiling.sensitivity import sensitivity
from adapmoe_lab.records import OFF, TunedConfig
from adapmoe_lab.simulation.simulate import Simulation
from adapmoe_lab.workbench.panel import Workbench
from adapmoe_lab.workbench.readout import as_html, tiles

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
        panel.readout.value,
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
    assert workbench.controls.draft.chosen_by == "by hand"
    assert shown(workbench)["Skipped"][0] == "16.7%"


def test_a_slider_that_sends_its_rounded_value_back_does_not_undo_the_curve(workbench):
    workbench.controls.curve.values = [0.55, OFF, OFF]
    echoed = workbench.controls.budget.value
    workbench.controls.budget.value = echoed + 1e-4
    assert workbench.controls.draft.chosen_by == "by hand"
    workbench.controls.budget.value = echoed + 0.01
    assert workbench.controls.draft.chosen_by == "uniform"


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
