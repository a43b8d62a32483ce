"""What a replayed step takes by what it misses, held against steps of an H200."""

import json
from pathlib import Path

import numpy as np
import pytest

from adapmoe_lab.profiling.hardware.solved_costs import TimedStep, replayed_costs
from adapmoe_lab.records import HardwareProfile, PrecisionPlan
from adapmoe_lab.simulation.timing.timeline import counted_replay, run_timeline

MEASURED = Path(__file__).parents[2] / "benchmarks/results/decode-olmoe-h200.json"
N_LAYERS, N_RUN = 16, 128


def steps_of(row):
    """Return a row's steps, their misses spread over the layers."""
    steps = []
    for ms, n_misses in zip(row["samples_ms"], row["misses"], strict=True):
        misses = np.full(N_LAYERS, n_misses // N_LAYERS)
        misses[: n_misses % N_LAYERS] += 1
        hits = N_RUN // N_LAYERS - misses
        steps.append(TimedStep(ms / 1e3, N_RUN, False, 0, 0, 0, hits, misses))
    return steps


@pytest.mark.parametrize("name", ["graph", "graph compiled"])
def test_steps_of_one_routing_foretell_those_of_another(name):
    document = json.loads(MEASURED.read_text())
    rows = [row for row in document["rows"] if row["row"] == name]
    known = [steps_of(row) for row in rows if row["routing"] != "recorded"]
    costs, miss_s = replayed_costs(known)
    size = int(document["expert_bytes"])
    assert 45e9 < size / miss_s < 56e9, "what the device reads over PCIe 5"
    profile = HardwareProfile("H200", "pcie", np.array([size]), np.array([miss_s]), **costs)
    sizes = PrecisionPlan.uniform("bfloat16", (N_LAYERS, 64), size)
    errors = []
    for row in (row for row in rows if row["routing"] == "recorded"):
        steps = steps_of(row)
        counts = [np.stack([getattr(step, kind) for step in steps]) for kind in ("hits", "misses")]
        predicted = run_timeline(counted_replay(*counts), profile.step_costs(sizes)).step_s.mean()
        errors.append(abs(predicted / np.mean([step.seconds for step in steps]) - 1))
    assert len(errors) == 4
    assert np.median(errors) < 0.05
    assert max(errors) < 0.1


def test_a_miss_is_unknown_where_none_differs():
    step = TimedStep(1e-3, 8, False, 0, 0, 0, np.full(4, 2), np.zeros(4, dtype=np.int64))
    costs, miss_s = replayed_costs([[step] * 5])
    assert miss_s is None
    assert costs["dense_step_s"] == pytest.approx(1e-3)
