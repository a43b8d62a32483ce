"""The sensitivity profile: what corrects its curves, and reading it back."""

from dataclasses import replace

import numpy as np
import pytest
from traces import make_sensitivity

from adapmoe_lab.records import RecordError, SensitivityProfile

ANCHORS = np.array([[0.001, 0.002, 0.0002], [0.1, 0.05, 0.001]])


@pytest.fixture
def anchored():
    return replace(make_sensitivity(), anchors=ANCHORS, excess=[3.0, 1.0], excess_se=[0.4, 0.1])


@pytest.mark.parametrize(
    ("total", "factor"), [(1e-9, 6.0), (0.001, 6.0), (0.01, 3.25), (0.1, 0.5), (9.0, 0.5)]
)
def test_correction_follows_the_logarithm_between_anchors_and_stays_beyond(anchored, total, factor):
    assert anchored.correction(total)[0] == pytest.approx(factor)


def test_errors_of_a_correction_are_those_of_repeated_draws(anchored):
    rng = np.random.default_rng(0)
    divergence = rng.normal(ANCHORS[:, 1], ANCHORS[:, 2], (50_000, 2))
    excess = rng.normal(anchored.excess, anchored.excess_se, (50_000, 2))
    drawn = (divergence * excess / ANCHORS[:, 0]).std(axis=0)
    errors = [anchored.correction(total)[1] for total in ANCHORS[:, 0]]
    assert errors == pytest.approx(drawn, rel=0.03)


def test_reads_back_equal(anchored, tmp_path):
    again = SensitivityProfile.load(anchored.save(tmp_path / "profile.npz"))
    for name in ("increase_nats", "anchors", "excess", "excess_se", "fisher"):
        np.testing.assert_array_equal(getattr(again, name), getattr(anchored, name))
    assert again.estimator == anchored.estimator


def test_without_anchors_nothing_is_corrected(anchored):
    assert anchored.uncorrected().correction(0.01) == (1.0, 0.0)


@pytest.mark.parametrize("first", [0.0, -0.001, 0.1])
def test_anchors_ascend_from_above_zero(anchored, first):
    wrong = ANCHORS.copy()
    wrong[0, 0] = first
    with pytest.raises(RecordError, match="must ascend from above zero"):
        replace(anchored, anchors=wrong)


def test_every_anchor_has_an_excess():
    with pytest.raises(RecordError, match="excess"):
        replace(make_sensitivity(), anchors=ANCHORS, excess=[1.0], excess_se=[0.1])
