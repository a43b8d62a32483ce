"""AdapMoE's rule on its published sensitivities, against what its authors measured."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adapmoe_lab as lab
from adapmoe_lab.policies.gating.adapmoe import adapmoe_cut, single_expert_layers
from adapmoe_lab.policies.gating.keep import keep_by_cuts
from adapmoe_lab.records import OFF

EVALUATIONS = ("lm_eval_mmlu_0shot_8x7b_nf4", "cot_hub_mmlu_5shot_8x7b_nf4")
FORCED = {0.007: [29, 30, 31], 0.01: [28, 29, 30, 31], 0.013: [26, 27, 28, 29, 30, 31]}


@pytest.mark.parametrize("model", ["mixtral-8x7b", "mixtral-8x22b"])
@pytest.mark.parametrize("threshold", [0.001, 0.003, 0.005, 0.007, 0.01, 0.013])
def test_cuts_are_the_published_ones(model, threshold):
    """The authors' code compares the smaller share with sqrt(T / S_l)."""
    sensitivity = lab.published_adapmoe().sensitivity[model]
    on_the_smaller = [math.sqrt(threshold / s) for s in sensitivity]
    assert adapmoe_cut(threshold, sensitivity).tolist() == [1 - cut for cut in on_the_smaller]


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_layers_forced_to_one_expert_are_the_published_ones(evaluation):
    published = lab.published_adapmoe()
    sensitivity = published.sensitivity["mixtral-8x7b"]
    for run in published.mmlu[evaluation]:
        single = single_expert_layers(adapmoe_cut(run.threshold, sensitivity))
        assert np.array_equal(single, run.single_expert_ratio == 1.0)
        assert np.array_equal(single, sensitivity <= 4 * run.threshold)
        assert np.flatnonzero(single).tolist() == FORCED.get(run.threshold, [])


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_a_lower_cut_never_keeps_more_in_the_published_runs(evaluation):
    """Layer by layer, what was measured grows with T as the rule says."""
    published = lab.published_adapmoe()
    sensitivity = published.sensitivity["mixtral-8x7b"]
    runs = published.mmlu[evaluation]
    for before, after in itertools.pairwise(runs):
        cuts = adapmoe_cut(before.threshold, sensitivity), adapmoe_cut(after.threshold, sensitivity)
        assert (cuts[1] < cuts[0]).all()
        assert (after.single_expert_ratio >= before.single_expert_ratio).all()


@given(st.integers(2, 8), st.floats(0, 1))
def test_single_expert_layers_leave_one_expert_however_even_the_shares(top_k, cut):
    even = np.ones((1, top_k), dtype=np.float32)
    first_cut = np.r_[cut, np.full(top_k - 2, OFF)]
    if abs(cut - 1 / top_k) > 1e-6:
        kept_one = keep_by_cuts(even, first_cut).sum() == 1
        assert single_expert_layers([cut], top_k).tolist() == [kept_one]
