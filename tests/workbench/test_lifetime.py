"""Closing a workbench gives back its widgets, its threads and the model, whichever way it ends."""

import gc
import threading
import time
import weakref

import ipywidgets
import psutil
import pytest
from checkpoints import save_tiny_mixtral

from adapmoe_lab.engine.loading import load
from adapmoe_lab.profiling.hardware.probe import probe_hardware
from adapmoe_lab.profiling.routing.profile import profile
from adapmoe_lab.profiling.sensitivity.sensitivity import sensitivity
from adapmoe_lab.views.widgets import Job, LatestWins, LiveFigure, OwningBox
from adapmoe_lab.workbench import panel
from adapmoe_lab.workbench.panel import Workbench

WAIT_S = 60
MOST_GROWTH_BYTES = 10 * 2**20


def open_widgets():
    """Return the ids of all widgets that a kernel would keep."""
    return set(ipywidgets.Widget.get_manager_state()["state"])


def is_soon(condition):
    """Whether something comes true before patience ends; threads need a moment to stop."""
    end = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def load_model(request, load_tiny, tmp_path):
    """Return a loader of the tiny checkpoint, or of one with as many experts as are asked for."""
    if not hasattr(request, "param"):
        return load_tiny
    folder = save_tiny_mixtral(tmp_path / "many", n_experts=request.param)
    return lambda: load(folder, link="none", device="cpu", announce=lambda _: None)


@pytest.fixture
def measured(load_model, texts, tmp_path, monkeypatch):
    """Return what a workbench needs beside a model, none of it holding one."""
    monkeypatch.chdir(tmp_path)
    model = load_model()
    return profile(model, texts), sensitivity(model, texts), probe_hardware(model, n_steps=6)


@pytest.fixture
def opened(load_model, measured, texts):
    """Return a maker of a used workbench and its model."""

    def open_one():
        model = load_model()
        bench = Workbench(model, *measured, texts=texts)
        bench.controls.budget.value = 0.25
        bench.controls.curve.values = [0.6, 0.7, 0.8]
        assert bench.wait(WAIT_S)
        bench.loss_job.start()
        assert bench.loss_job.wait(WAIT_S)
        assert bench.wait(WAIT_S)
        return bench, model

    return open_one


CLOSINGS = {
    "close": lambda bench: bench.close(),
    "button": lambda bench: bench.close_button.click(),
    "twice": lambda bench: (bench.close_button.click(), bench.close()),
    "dropped": lambda bench: None,
}


@pytest.mark.parametrize("way", CLOSINGS)
def test_nothing_is_left_of_a_closed_workbench(opened, way):
    widgets, threads = open_widgets(), set(threading.enumerate())
    bench, model = opened()
    assert len(open_widgets()) > len(widgets) + 30
    gone = [weakref.ref(part) for part in (model, model.engine, bench.panel, bench.panel._session)]
    CLOSINGS[way](bench)
    del model
    if way == "dropped":
        del bench
    assert is_soon(lambda: set(threading.enumerate()) <= threads)
    gc.collect()
    assert open_widgets() == widgets
    assert [part() for part in gone] == [None] * 4


@pytest.mark.parametrize("load_model", [128], indirect=True, ids=["7 MiB of experts"])
def test_ten_rounds_take_no_more_memory_than_one(opened):
    def one_round():
        bench, model = opened()
        bench.close()
        del bench, model
        gc.collect()
        return psutil.Process().memory_info().rss

    one_round()
    first = one_round()
    used = [one_round() for _ in range(10)]
    assert used[-1] - first < MOST_GROWTH_BYTES, [f"{(u - first) / 2**20:.1f} MiB" for u in used]


def test_a_closed_workbench_says_so_and_shows_nothing(opened):
    bench, _ = opened()
    shown = bench._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in str(shown)
    controls, job, figure = bench.controls, bench.latency_job, bench.layers_figure
    bench.close()
    for use in (lambda: bench.config, lambda: bench.wait(0), lambda: bench.controls):
        with pytest.raises(RuntimeError, match=r"is closed; make a new one with lab\.Workbench"):
            use()
    assert "is closed" in bench._repr_mimebundle_()["text/plain"] == repr(bench)
    before = figure.figure
    controls.budget.value = 0.1  # a widget somebody kept moves nothing any more
    assert not job.start()
    assert figure.figure is before
    with pytest.raises(AttributeError, match="has no '_private'"):
        bench._private  # noqa: B018


def test_what_is_measured_is_cancelled(opened, monkeypatch):
    bench, _ = opened()
    job, go_on, reached = bench.latency_job, threading.Event(), threading.Event()

    def measuring(progress):
        reached.set()
        go_on.wait(WAIT_S)
        progress(1, 2)

    monkeypatch.setattr(job, "_work", measuring)
    assert job.start()
    assert reached.wait(WAIT_S)
    bench.close()
    go_on.set()
    assert job.wait(WAIT_S)
    assert job.state == "cancelled"


class FakeShell:
    """Stands for a kernel's shell that runs a cell."""

    def __init__(self, cell, run):
        self._request = {"metadata": {"cellId": cell}, "header": {"msg_id": run}}

    def get_parent(self):
        return self._request


def test_a_cell_that_runs_again_closes_what_it_made(opened, monkeypatch):
    def made_in(cell, run):
        monkeypatch.setattr(panel, "get_ipython", lambda: FakeShell(cell, run))
        return opened()[0]

    widgets = open_widgets()
    first, beside = made_in("a", "1"), made_in("a", "1")
    other, nowhere = made_in("b", "2"), made_in(None, "3")
    again = made_in("a", "4")
    open_now = [bench._closing.alive for bench in (first, beside, other, nowhere, again)]
    assert open_now == [False, False, True, True, True]
    made_in(None, "5").close()
    assert nowhere._closing.alive
    for bench in (other, nowhere, again):
        bench.close()
    assert open_widgets() == widgets


def test_a_box_closes_all_it_holds_and_nothing_else():
    before = open_widgets()
    kept = ipywidgets.IntSlider()
    beside = open_widgets()
    inner = ipywidgets.HBox([ipywidgets.Button(), ipywidgets.Text()])
    box = OwningBox([inner, Job(lambda progress: None), ipywidgets.Tab([ipywidgets.HTML()])])
    box.close()
    box.close()
    assert open_widgets() == beside
    OwningBox([kept]).close()
    assert open_widgets() == before


def test_plotly_goes_with_the_last_figure():
    before = open_widgets()
    first, second = LiveFigure(), LiveFigure()
    first.close()
    first.close()
    assert second._program in open_widgets()
    second.close()
    assert open_widgets() == before
    third = LiveFigure()
    assert third._program in open_widgets()
    third.close()


def test_an_idle_worker_has_no_thread():
    threads = set(threading.enumerate())
    latest = LatestWins(lambda value: None, on_error=pytest.fail)
    for value in range(3):
        latest.submit(value)
        assert latest.wait(WAIT_S)
    assert is_soon(lambda: set(threading.enumerate()) <= threads)
