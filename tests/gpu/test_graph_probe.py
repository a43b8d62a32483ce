"""Probing a machine by steps that are replayed, and what is predicted of them.

On a GPU; without one in Triton's interpreter, as `tests/engine/test_graph_interpreted.py` does.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from interpreted_graph import (
    IS_INTERPRETED,
    NEEDS_DEVICE,
    counting_steps,
    load_graph,
)
from tiny_models import save_tiny

from adapmoe_lab.engine.graph import captured_step
from adapmoe_lab.engine.graph.requirements import CaptureError
from adapmoe_lab.profiling.hardware.probe import probe_hardware
from adapmoe_lab.profiling.hardware.timed_steps import UntimedExecutorError

pytestmark = NEEDS_DEVICE
N_STEPS = 2 if IS_INTERPRETED else 24


@pytest.fixture(autouse=True)
def captured():
    with counting_steps() as steps:
        yield steps


def test_replayed_steps_are_probed_in_one_capture(tmp_path, captured):
    model = load_graph(save_tiny("mixtral", tmp_path))
    before = replace(model.config)
    hardware = probe_hardware(model, n_steps=N_STEPS, rounds=1)
    assert len(captured) == 1
    assert hardware.conditions["executor"] == "graph"
    assert hardware.dense_step_s > 0
    assert hardware.predict_s is None, "nothing is prefetched"
    costs = hardware.step_costs(model.spec.precision, is_gated=True)
    assert costs.host.miss_s == 0, "a miss is read by the device"
    assert hardware.load_s(model.spec.mean_expert_bytes) > 0
    assert model.config.fingerprint() == before.fingerprint()
    assert model.engine.runs_steps_by == "graph"


def test_steps_that_turn_out_to_be_the_hosts_are_not_probed_as_replayed(tmp_path, monkeypatch):
    def failing(*_):
        raise CaptureError("It syncs. Load it otherwise.")

    monkeypatch.setattr(captured_step, "recorded", failing)
    model = load_graph(save_tiny("mixtral", tmp_path), executor="auto")
    with pytest.raises(
        UntimedExecutorError, match=r"driven by the host.*: It syncs. Load it again"
    ):
        probe_hardware(model, n_steps=N_STEPS, rounds=1)
