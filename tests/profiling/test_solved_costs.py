"""What the parts of a step take is found from steps that differ in them."""

from dataclasses import fields, replace

import numpy as np
import pytest

from adapmoe_lab.profiling.hardware.solved_costs import TimedStep, least_absolute, solved_costs
from adapmoe_lab.records import HardwareProfile


def test_what_a_few_steps_are_off_by_matters_little():
    rng = np.random.default_rng(0)
    columns = np.stack([np.ones(300), rng.integers(0, 9, 300), rng.integers(0, 2, 300)], axis=1)
    true = np.array([8e-3, 2e-4, 1e-3])
    seconds = columns @ true * rng.normal(1, 0.01, 300)
    seconds[:20] *= 3
    np.testing.assert_allclose(least_absolute(columns, seconds), true, rtol=0.05)


COSTS = {
    "dense_step_s": 5e-3,
    "expert_s": 1e-4,
    "gate_s": 15e-5,
    "predict_s": 2e-5,
    "gated_predict_s": 2e-5,
    "predict_overhead_s": 1e-4,
}


def steps_that_take(costs):
    """Return steps that take so much over two layers, without misses."""
    nothing = np.zeros(2, dtype=np.int64)
    steps = [
        TimedStep(0.0, n_run, is_gated, n_queries, n_points, 0, nothing, nothing)
        for n_run in (2, 4)
        for is_gated in (False, True)
        for n_queries, n_points in ((0, 0), (1, 1), (3, 1))
    ]
    return [
        replace(step, seconds=sum(seconds * step.counts[name] for name, seconds in costs.items()))
        for step in steps
    ]


def test_costs_are_told_apart():
    found = solved_costs([steps_that_take(COSTS)], None, alone_s=9.0)
    assert found == pytest.approx(COSTS)


def test_every_cost_of_a_step_is_one_of_a_hardware_profile():
    (step, *_) = steps_that_take(COSTS)
    assert set(step.counts) <= {f.name for f in fields(HardwareProfile)}


def test_misses_take_no_part_in_the_result():
    steps = steps_that_take(COSTS)
    missing = [replace(step, misses=np.array([7 * n % 5, 1])) for n, step in enumerate(steps)]
    slower = [replace(m, seconds=m.seconds + 7e-4 * m.misses.sum()) for m in missing]
    for miss_s in (7e-4, None):
        assert solved_costs([slower], miss_s, alone_s=9.0) == pytest.approx(COSTS)


def test_what_would_be_negative_is_nothing_and_the_rest_is_found_without_it():
    found = solved_costs([steps_that_take({**COSTS, "gate_s": -15e-6})], None, alone_s=9.0)
    assert found["gate_s"] == 0
    assert found["dense_step_s"] == pytest.approx(5e-3, rel=0.01)
    assert found["expert_s"] == pytest.approx(1e-4, rel=0.1)


def test_a_decode_that_was_slow_as_a_whole_changes_nothing():
    """Each decode is short of some ways to run a step, as on a machine, so that means mislead."""
    steps = steps_that_take(COSTS)
    decodes = [[steps[(first + 5 * i) % 12] for i in range(8)] for first in range(12)]
    for decode, slowness in ((decodes[2], 1.6), (decodes[5], 2.0), (decodes[9], 1.3)):
        decode[:] = [replace(step, seconds=slowness * step.seconds) for step in decode]
    assert solved_costs(decodes, None, alone_s=9.0) == pytest.approx(COSTS, rel=1e-3)
