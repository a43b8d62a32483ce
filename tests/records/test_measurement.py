import json

import numpy as np
import pytest

from adapmoe_lab.records import (
    IncomparableError,
    LatencyReport,
    LossReport,
    Measurement,
    RecordError,
    Traffic,
)


def test_median_and_spread_are_of_the_raw_samples():
    measurement = Measurement([1.0, 2.0, 3.0, 4.0, 100.0], "s")
    assert measurement.median == 3.0
    assert measurement.spread == (2.0, 4.0)


def test_ratio_needs_like_conditions():
    fast = Measurement([1.0], "s", conditions={"slots": 8, "device": "a"})
    slow = Measurement([2.0], "s", conditions={"slots": 4, "device": "a"})
    with pytest.raises(IncomparableError, match=r"unlike conditions \(slots: 4 against 8\)"):
        slow.ratio_to(fast)
    assert slow.ratio_to(fast, varied=("slots",)) == 2.0


def test_ratio_needs_one_unit():
    with pytest.raises(IncomparableError, match="Cannot compare 's' with 'nats'"):
        Measurement([1.0], "s").ratio_to(Measurement([1.0], "nats"))


def test_empty_measurement_is_refused():
    with pytest.raises(RecordError, match="at least one sample"):
        Measurement([], "s")


def test_loss_increase_is_paired_by_sequence():
    baseline = LossReport([10.0, 40.0], [5, 10], 0.0, "same")
    worse = LossReport([10.5, 41.0], [5, 10], 0.2, "same")
    increase, error = worse.increase_over(baseline)
    assert increase == pytest.approx(0.1)
    assert error == pytest.approx(0.0, abs=1e-12)


def test_one_sequence_tells_no_error():
    baseline = LossReport([10.0], [5], 0.0, "same")
    assert LossReport([11.0], [5], 0.2, "same").increase_over(baseline) == (
        pytest.approx(0.2),
        None,
    )


def test_loss_on_other_texts_is_not_compared():
    with pytest.raises(RecordError, match="on the same texts"):
        LossReport([1.0], [1], 0.0, "a").increase_over(LossReport([1.0], [1], 0.0, "b"))


def test_what_is_read_back_compares_with_itself():
    conditions = {"shape": (2, (3, 4)), "by": {"a": [(1,)], 8: np.float64(0.5)}, "n": np.int64(3)}
    part = Measurement([2.0], "s", conditions=conditions)
    traffic = Traffic([1], [1], 1, 10, 1, 1, [0], [0])
    report = LatencyReport(part, part, part, traffic, traffic)
    again = LatencyReport.from_json(json.loads(json.dumps(report.to_json())))
    assert again.decode.ratio_to(report.decode) == report.decode.ratio_to(again.decode) == 1.0
    assert again.to_json() == report.to_json()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_refused(wrong):
    told = (
        rf"loss of 1 of 3 texts is not finite, first that of text 1, {wrong}\. .*dtype=\"float32\""
    )
    with pytest.raises(RecordError, match=told):
        LossReport([1.0, wrong, 2.0], [1, 1, 1], 0.0, "a")
