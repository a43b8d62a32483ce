"""What a forward pass takes, from what a machine was measured to take."""

from dataclasses import fields

import numpy as np
import pytest

from adapmoe_lab.records import HardwareProfile, PrecisionPlan, RecordError
from adapmoe_lab.records.step_costs import HostCosts, StepCosts, chunk_bounds

MEASURED = {
    "miss_s": 1e-5,
    "wait_s": -2e-5,
    "gate_s": 3e-5,
    "predict_s": 4e-5,
    "gated_predict_s": 5e-5,
    "predict_overhead_s": 6e-5,
    "predict_output_overhead_s": 7e-5,
    "host_copy_s": 8e-6,
}
LAYOUT = PrecisionPlan([["int4", "int8"], ["int4", "int4"]], [[10, 18], [10, 10]])


def profile(**values):
    alone = {"int4": 1e-5, "int8": 2e-5}
    return HardwareProfile(
        "cpu", "emulated:x", [10, 100], [1.0, 4.0], 0.5, 3e-5,
        {"experts_by_precision": {"int4": 1}}, expert_s_by_precision=alone, **values,
    )  # fmt: skip


def test_they_are_what_was_measured():
    plain = profile(**MEASURED).step_costs(LAYOUT)
    assert plain.host == HostCosts(
        dense_layer_s=0.25,
        head_s=0.0,
        miss_s=1e-5,
        wait_s=-2e-5,
        predict_s=4e-5,
        chunk_s=2e-6,
        predict_overhead_s=6e-5,
        predict_output_overhead_s=7e-5,
    )
    np.testing.assert_allclose(plain.expert_s, [[3e-5, 6e-5], [3e-5, 3e-5]])
    assert plain.of_expert(0, 1) == pytest.approx(6e-5)
    assert plain.load_s(100) == 4.0
    gated = profile(**MEASURED).step_costs(LAYOUT, is_gated=True)
    assert (gated.host.dense_layer_s, gated.host.predict_s) == (0.25 + 3e-5, 5e-5)
    ungated = profile(**{**MEASURED, "gated_predict_s": None}).step_costs(LAYOUT, is_gated=True)
    assert ungated.host.predict_s == 4e-5


def test_what_was_not_measured_takes_nothing():
    assert profile().step_costs(LAYOUT).host == HostCosts(dense_layer_s=0.25)


def test_every_cost_of_the_host_is_measured_or_derived():
    """A new one fails here until a machine's profile has a field of its name, or it is derived."""
    measured = {f.name for f in fields(HardwareProfile)}
    assert set(HostCosts._fields) - measured == {"dense_layer_s", "head_s", "chunk_s"}


def test_loads_are_those_of_what_is_left_and_of_chunks():
    costs = StepCosts(load_s=lambda n: 1.0 + n, expert_bytes=[[10, 16]])
    assert chunk_bounds(10) == [0, 2, 5, 7, 10]
    expected = [[11, 10], [9, 8], [6, 5], [4, 3], [0, 0]]  # nothing left: not even a latency
    assert costs.remaining_loads[0, 0].tolist() == expected
    assert costs.chunk_loads[0, 0].tolist() == [[3, 2], [4, 3], [3, 2], [4, 3]]
    assert costs.chunk_loads[0, 1].tolist() == [[5, 4]] * 4
    with pytest.raises(ValueError, match="read-only"):
        costs.chunk_loads[0, 0] = 0


def test_one_number_is_for_every_expert():
    assert StepCosts(expert_s=0.5).of_expert(3, 7) == 0.5
    assert StepCosts(expert_s=0.5, expert_bytes=[[1, 2]]).expert_s.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepCosts().remaining_loads, "needs the bytes of every expert and what the link"),
        (lambda: StepCosts(expert_s=[1.0]), r"expert_s must have shape \[any, any\], got \[1\]"),
        (
            lambda: StepCosts(expert_s=[[1.0]], expert_bytes=[[1, 2]]),
            r"expert_s must have shape \[1, 2\], got \[1, 1\]",
        ),
        (
            lambda: profile().step_costs(PrecisionPlan.uniform("int4", (1, 2))),
            "Costs need the bytes of every expert; int4 comes without",
        ),
    ],
)
def test_costs_that_cannot_be_are_refused(make, message):
    with pytest.raises(RecordError, match=message):
        make()
