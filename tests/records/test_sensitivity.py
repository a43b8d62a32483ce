"""The sensitivity profile: what corrects its curves, and reading it back."""

from dataclasses import replace

import numpy as np
import pytest
from traces import make_sensitivity

from adapmoe_lab.records import RecordError, SensitivityProfile

ANCHORS = np.array([[0.001, 0.002, 0.0002], [0.1, 0.05, 0.001]])


@pytest.fixture
def anchored():
    plain = make_sensitivity()
    slope = 0.3 * plain.increase_nats[::-1]
    return replace(
        plain,
        first_order=slope,
        first_order_se=slope / 5,
        anchors=ANCHORS,
        factor=[6.0, 0.5],
        joint_error=[1.5, 1.1],
    )


@pytest.mark.parametrize(
    ("total", "factor"), [(1e-9, 6.0), (0.001, 6.0), (0.01, 3.25), (0.1, 0.5), (9.0, 0.5)]
)
def test_correction_follows_the_logarithm_between_anchors_and_stays_beyond(anchored, total, factor):
    assert anchored.correction(total)[0] == pytest.approx(factor)


def test_an_increase_is_its_first_order_part_and_a_factor_of_the_curves(anchored):
    column = 13
    cuts = np.full(anchored.n_layers, anchored.cuts[column])
    curve, curve_se, first, first_se = (
        getattr(anchored, name)[:, column]
        for name in ("increase_nats", "increase_se", "first_order", "first_order_se")
    )
    factor, joint_error = anchored.correction(curve.sum())
    found, error = anchored.increase(cuts)
    assert found == pytest.approx(first + factor * curve)
    assert error == pytest.approx(np.hypot(first_se, factor * curve_se))
    total, total_se = anchored.total_increase(cuts)
    assert total == pytest.approx(found.sum())
    assert total_se == pytest.approx(joint_error * np.linalg.norm(error))
    assert anchored.first_order_increase(cuts) == pytest.approx(first)


def test_an_error_that_no_curve_has_is_none_and_of_nothing_skipped_is_none_to_have(anchored):
    unsure = replace(
        anchored,
        increase_se=np.full_like(anchored.increase_se, np.nan),
        joint_error=np.full_like(anchored.joint_error, np.nan),
    )
    cuts = np.full(anchored.n_layers, 0.6)
    total, error = unsure.total_increase(cuts)
    assert total == anchored.total_increase(cuts)[0]
    assert error is None
    assert unsure.total_increase(np.full(anchored.n_layers, 2.0)) == (0, 0)


def test_reads_back_equal(anchored, tmp_path):
    again = SensitivityProfile.load(anchored.save(tmp_path / "profile.npz"))
    for name in ("increase_nats", "first_order", "anchors", "factor", "joint_error", "fisher"):
        np.testing.assert_array_equal(getattr(again, name), getattr(anchored, name))
    assert again.estimator == anchored.estimator


def test_uncorrected_are_the_curves_alone(anchored):
    alone = anchored.uncorrected()
    assert alone.correction(0.01) == (1.0, 1.0)
    np.testing.assert_array_equal(alone.increase_nats, anchored.increase_nats)
    assert alone.first_order_increase(np.full(alone.n_layers, 0.5)).tolist() == [0.0] * 3


@pytest.mark.parametrize("first", [0.0, -0.001, 0.1])
def test_anchors_ascend_from_above_zero(anchored, first):
    wrong = ANCHORS.copy()
    wrong[0, 0] = first
    with pytest.raises(RecordError, match="must ascend from above zero"):
        replace(anchored, anchors=wrong)


def test_every_anchor_has_a_factor():
    with pytest.raises(RecordError, match="factor"):
        replace(make_sensitivity(), anchors=ANCHORS, factor=[1.0], joint_error=[1.0])
