import html
import json
import threading
import time

import plotly.graph_objects as go
import pytest
import traitlets

from adapmoe_lab.records import OFF
from adapmoe_lab.views.widgets import (
    DownloadButton,
    Job,
    LatestWins,
    LiveFigure,
    ThresholdCurve,
)

PATIENCE_S = 10


def finished(job):
    assert job.wait(PATIENCE_S)
    return job


def test_a_job_gives_its_result_to_the_callback():
    received = []
    job = Job(lambda progress: 6 * 7, "Answer", on_done=received.append)
    assert job.state == "idle"
    assert job.start()
    assert finished(job).state == "done"
    assert (job.result, received, job.error) == (42, [42], None)
    assert "done" in job.message.value
    assert (job.run_button.disabled, job.cancel_button.disabled) == (False, True)


def test_a_job_shows_how_far_it_is():
    seen = threading.Event()
    go_on = threading.Event()

    def work(progress):
        progress(3, 4, "layer <3>")
        go_on.wait(PATIENCE_S)

    job = Job(work)
    job.message.observe(lambda change: seen.set(), "value")
    job.start()
    assert seen.wait(PATIENCE_S)
    assert (job.state, job.bar.value) == ("running", 0.75)
    assert job.message.value.startswith("layer &lt;3&gt;")
    assert (job.run_button.disabled, job.cancel_button.disabled) == (True, False)
    go_on.set()
    assert finished(job).bar.value == 1


def test_reports_reach_the_page_ten_times_a_second_at_most():
    shown = []

    def work(progress):
        for done in range(100_000):
            progress(done, 100_000, str(done))

    job = Job(work)
    job.bar.observe(lambda change: shown.append(change.new), "value")
    started_s = time.monotonic()
    job.start()
    finished(job)
    elapsed_s = time.monotonic() - started_s
    assert len(shown) <= 10 * elapsed_s + 2  # the reset before, the full bar after


def test_two_clicks_start_one_run():
    runs, go_on = [], threading.Event()

    def work(progress):
        runs.append(1)
        go_on.wait(PATIENCE_S)

    job = Job(work)
    job.run_button.click()
    job.run_button.click()
    assert not job.start()
    go_on.set()
    finished(job)
    assert runs == [1]
    assert job.start(), "a finished job can be run again"
    finished(job)


def test_cancel_ends_the_work_at_its_next_report():
    started, go_on, after = threading.Event(), threading.Event(), []

    def work(progress):
        started.set()
        go_on.wait(PATIENCE_S)
        progress(1, 2)
        after.append("reached")

    job = Job(work, on_done=after.append)
    job.start()
    assert started.wait(PATIENCE_S)
    job.cancel_button.click()
    go_on.set()
    assert finished(job).state == "cancelled"
    assert (after, job.error) == ([], None)
    job.start()
    assert finished(job).state == "done", "the next run does not remember the cancel"


@pytest.mark.parametrize("error", [ValueError("20 slots < 32 layers"), SystemExit("bye")])
def test_what_ends_the_work_is_shown(error):
    def work(progress):
        raise error

    job = Job(work)
    job.start()
    assert finished(job).state == "error"
    assert job.error is error
    assert html.escape(f"{type(error).__name__}: {error}") in job.message.value
    assert "Traceback" in job.details.value
    assert not job.run_button.disabled


def test_what_the_callback_raises_is_shown_too():
    def on_done(result):
        raise KeyError("no such figure")

    job = Job(lambda progress: "result", on_done=on_done)
    job.start()
    assert finished(job).state == "error"
    assert "no such figure" in job.message.value
    assert job.result == "result"


def test_only_the_newest_pending_value_is_computed():
    computed, started, go_on = [], threading.Event(), threading.Event()

    def work(value):
        computed.append(value)
        started.set()
        go_on.wait(PATIENCE_S)

    latest = LatestWins(work, on_error=pytest.fail)
    latest.submit(0)
    assert started.wait(PATIENCE_S)
    for value in range(1, 100):
        latest.submit(value)
    assert not latest.wait(timeout_s=0)
    go_on.set()
    assert latest.wait(PATIENCE_S)
    assert computed == [0, 99]
    latest.close()


def test_an_error_goes_to_the_callback_and_the_worker_goes_on():
    errors, computed = [], []

    def work(value):
        if value < 0:
            raise ValueError(f"{value} is negative")
        computed.append(value)

    latest = LatestWins(work, on_error=errors.append)
    for value in (-1, 2):
        latest.submit(value)
        assert latest.wait(PATIENCE_S)
    assert [str(error) for error in errors] == ["-1 is negative"]
    assert computed == [2]
    latest.close()


def test_after_close_nothing_is_computed():
    computed = []
    latest = LatestWins(computed.append, on_error=pytest.fail)
    latest.close()
    latest.submit(1)
    assert latest.wait(PATIENCE_S)
    assert computed == []


def test_a_curve_starts_committed_and_keeps_what_it_is_given():
    curve = ThresholdCurve(values=[0.6, 0.7, OFF], baseline=[0.8, 0.8, 0.8], vmin=0.5)
    assert curve.committed == [0.6, 0.7, OFF]
    curve.values = [0.9] * 64
    assert len(curve.values) == 64
    assert curve.committed == [0.6, 0.7, OFF]


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_curve_refuses_values_that_are_no_cut(value):
    curve = ThresholdCurve(values=[0.6, 0.7])
    with pytest.raises(traitlets.TraitError, match=r"layer 1 has .* Use 2 for"):
        curve.values = [0.6, value]
    assert curve.values == [0.6, 0.7]


@pytest.mark.parametrize(("trait", "value"), [("vmin", 1.0), ("vmax", 0.5), ("step", 0.0)])
def test_a_curve_refuses_an_axis_without_length(trait, value):
    curve = ThresholdCurve(values=[0.6], vmin=0.5, vmax=1.0)
    with pytest.raises(traitlets.TraitError, match="must be"):
        setattr(curve, trait, value)


def test_a_curve_can_be_given_another_axis_at_once():
    curve = ThresholdCurve(values=[0.2], vmin=0.1, vmax=0.4)
    with curve.hold_trait_notifications():
        curve.vmin, curve.vmax = 0.5, 1.0
    assert (curve.vmin, curve.vmax) == (0.5, 1.0)


def test_a_live_figure_takes_over_a_whole_figure_in_one_message():
    live = LiveFigure()
    sent = []
    live.observe(lambda change: sent.append(change.name), traitlets.All)
    figure = go.Figure(data=[{"type": "bar", "y": [1, 2]}], layout={"height": 300})
    live.show(figure)
    live.show(figure)
    assert sent == ["_content"]
    assert json.loads(live._content) == json.loads(figure.to_json())
    assert live.figure == figure


def test_live_figures_share_one_copy_of_plotly():
    first, second = LiveFigure(), LiveFigure()
    assert first._program == second._program
    assert len(json.dumps(first.get_state())) < 50_000


def test_a_download_button_holds_bytes():
    button = DownloadButton("tuned.json", '{"µ": 1}')
    assert (button.filename, button.content) == ("tuned.json", '{"µ": 1}'.encode())
    button.disabled = True
    button.offer("a.bin", b"\x00\xff")
    assert (button.filename, button.content, button.disabled) == ("a.bin", b"\x00\xff", False)


@pytest.mark.parametrize("widget", [ThresholdCurve, LiveFigure, DownloadButton])
def test_a_widget_asks_the_network_for_nothing(widget):
    program = str(widget._esm).replace("http://www.w3.org/2000/svg", "")
    assert "http" not in program
    assert "import " not in program.replace("await import", "")
