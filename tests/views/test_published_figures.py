"""The paper's figures, computed from its published numbers."""

import numpy as np
import pytest

import adapmoe_lab as lab
from adapmoe_lab.views import figures


def test_published_cuts_mark_the_layers_that_always_run_one_expert():
    info = figures.published_cuts_info(lab.published_adapmoe(), [0.0, 0.005, 0.013])
    assert (info.cuts[0] > 1).all()
    assert info.cuts[1, 0] == pytest.approx(1 - (0.005 / 46.69189453125) ** 0.5)
    assert not info.single_expert[:2].any()
    assert np.flatnonzero(info.single_expert[2]).tolist() == [26, 27, 28, 29, 30, 31]
    figure = figures.plot_published_cuts(info)
    assert [line.name for line in figure.data[1:]] == ["T = 0", "T = 0.005", "T = 0.013"]
    assert np.isnan(figure.data[1].y).all()
    diamonds = np.asarray(figure.data[3].marker.symbol) == "diamond"
    assert np.array_equal(diamonds, info.single_expert[2])
    assert figure.data[3].customdata[31] == "always one expert"


def test_published_cuts_of_a_model_that_was_not_published():
    with pytest.raises(ValueError, match=r"'olmoe'.*there are mixtral-8x7b, mixtral-8x22b"):
        figures.published_cuts_info(lab.published_adapmoe(), model="olmoe")


def test_published_accuracy_is_drawn_against_both_units():
    info = figures.published_accuracy_info(lab.published_adapmoe())
    zero_shot, five_shot = info.curves
    assert (zero_shot.name, five_shot.name) == ("0-shot (lm-eval)", "5-shot (chain-of-thought-hub)")
    assert zero_shot.threshold.tolist() == [0, 0.001, 0.003, 0.005, 0.007, 0.01, 0.013]
    assert zero_shot.accuracy[[0, -1]] == pytest.approx([0.67768, 0.67512], abs=1e-5)
    assert five_shot.accuracy[[0, -1]] == pytest.approx([0.69385, 0.69299], abs=1e-5)
    for curve in info.curves:
        assert curve.single_expert_ratio == pytest.approx(2 * curve.skipped_fraction)
        assert curve.experts_per_token == pytest.approx(2 * (1 - curve.skipped_fraction))
    assert (info.claimed_ratio, info.claimed_skipped_fraction) == (0.25, 0.125)
    figure = figures.plot_published_accuracy(info)
    below, above = figure.layout.xaxis.range, figure.layout.xaxis2.range
    assert above == pytest.approx([2 * end for end in below])
    assert below[0] < 0 < zero_shot.skipped_fraction.max() < below[1]
    assert figure.layout.shapes[0].x0 == 0.125
    assert "2 → 1.75 experts: 12.5% fewer, not 25%" in figure.layout.title.text
