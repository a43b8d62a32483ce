"""What the parts of a step take is found from steps that differ in them."""

from dataclasses import replace

import numpy as np
import pytest

from adapmoe_lab.profiling.hardware.timed_steps import TimedStep, least_absolute, solved_costs


def test_what_a_few_steps_are_off_by_matters_little():
    rng = np.random.default_rng(0)
    columns = np.stack([np.ones(300), rng.integers(0, 9, 300), rng.integers(0, 2, 300)], axis=1)
    true = np.array([8e-3, 2e-4, 1e-3])
    seconds = columns @ true * rng.normal(1, 0.01, 300)
    seconds[:20] *= 3
    np.testing.assert_allclose(least_absolute(columns, seconds), true, rtol=0.05)


PARTS = {
    "step": 5e-3,
    "expert": 1e-4,
    "gate": 3e-4,
    "predict": 2e-5,
    "gated_predict": 2e-5,
    "predict_overhead": 1e-4,
}
"""Seconds."""


def steps_that_take(step, expert, gate, prediction, gated_predict, ask):
    """Return steps whose parts take so much, over two layers without misses."""
    nothing = np.zeros(2, dtype=np.int64)
    return [
        TimedStep(
            step + n_run * expert + is_gated * gate + n_queries * ask
            + n_candidates * (gated_predict if is_gated else prediction),
            n_run, is_gated, n_candidates, n_queries, 0, nothing, nothing,
        )
        for n_run in (2, 4)
        for is_gated in (False, True)
        for n_candidates, n_queries in ((0, 0), (1, 1), (3, 1))
    ]  # fmt: skip


def test_parts_are_told_apart():
    found = solved_costs([steps_that_take(**PARTS)], None, alone_s=9.0)
    assert found == pytest.approx(PARTS)


def test_what_would_be_negative_is_nothing_and_the_rest_is_found_without_it():
    found = solved_costs([steps_that_take(**{**PARTS, "gate": -3e-5})], None, alone_s=9.0)
    assert found["gate"] == 0
    assert found["step"] == pytest.approx(5e-3, rel=0.01)
    assert found["expert"] == pytest.approx(1e-4, rel=0.1)


def test_a_decode_that_was_slow_as_a_whole_changes_nothing():
    """Each decode is short of some ways to run a step, as on a machine, so that means mislead."""
    steps = steps_that_take(**PARTS)
    decodes = [[steps[(first + 5 * i) % 12] for i in range(8)] for first in range(12)]
    for decode, pace in ((decodes[2], 1.6), (decodes[5], 2.0), (decodes[9], 1.3)):
        decode[:] = [replace(step, seconds=pace * step.seconds) for step in decode]
    assert solved_costs(decodes, None, alone_s=9.0) == pytest.approx(PARTS, rel=1e-3)
