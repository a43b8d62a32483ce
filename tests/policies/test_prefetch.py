import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapmoe_lab.policies.gating.keep import keep_by_cuts
from adapmoe_lab.policies.prefetch.candidates import kept_candidates, likely_needed
from adapmoe_lab.policies.prefetch.expected_gain import (
    MOST_ISSUED,
    expected_gain_s,
    needed_at,
    priority,
)
from adapmoe_lab.records import GatingTable
from adapmoe_lab.records.step_costs import chunk_bounds

seconds = st.floats(0, 10)


@given(st.integers(0, 10**9))
def test_chunks_are_the_whole_expert_in_nearly_equal_parts(n_bytes):
    bounds = chunk_bounds(n_bytes)
    assert (bounds[0], bounds[-1]) == (0, n_bytes)
    parts = np.diff(bounds)
    assert parts.max() - parts.min() <= 1


@given(st.floats(0, 1), seconds, seconds, st.floats(0.01, 10))
def test_a_gain_is_at_most_a_load_and_nothing_without_idle_time(chance, begins, needed, load_s):
    gain = expected_gain_s(chance, begins, needed, load_s, load_s / 4)
    assert gain <= chance * load_s
    if needed <= begins:
        assert gain == 0


def test_a_sure_prediction_saves_the_idle_time_and_a_wrong_one_costs_a_chunk():
    assert expected_gain_s(1.0, 2.0, 5.0, 4.0, 1.0) == 3.0
    assert expected_gain_s(1.0, 2.0, 5.0, 4.0, 1.5) == 2.0  # chunks that take six seconds
    assert expected_gain_s(0.0, 2.0, 5.0, 4.0, 1.0) == -1.0
    assert expected_gain_s(0.5, 2.0, 9.0, 4.0, 1.0) == 2.0  # it is over before it can harm


def test_layers_in_between_are_waited_for():
    assert needed_at(1.0, 1, 2.0, 3.0) == 3.0
    assert needed_at(1.0, 3, 2.0, 3.0) == 13.0


def test_candidates_of_one_token_stay_in_order():
    experts, chance = likely_needed(np.array([[4, -1, 2]]), np.array([0.5, 0.9, 0.7]))
    assert (experts.tolist(), chance.tolist()) == ([4, 2], [0.5, 0.7])


def test_candidates_of_several_tokens_are_independent():
    experts, chance = likely_needed(np.array([[4, 2], [2, 1], [2, -1]]), np.array([0.5, 0.25]))
    assert experts.tolist() == [2, 4, 1]
    np.testing.assert_allclose(chance, [1 - 0.75 * 0.5 * 0.5, 0.5, 0.25])


def test_candidates_that_the_gate_would_skip_are_left_out():
    table = GatingTable(np.array([[0.6, 0.8], [2.0, 2.0]]))
    scores = np.random.default_rng(0).dirichlet(np.ones(4), 200)[:, :4]
    scores = -np.sort(-scores, axis=1).astype(np.float16)
    experts = np.tile(np.arange(4), (200, 1))
    keep = kept_candidates(experts, scores, table, 0)
    expected = keep_by_cuts(scores[:, :3].astype(np.float32), table.cuts[0])
    np.testing.assert_array_equal(keep[:, :3], expected)
    assert not keep[:, 3].any()  # beyond the router's three
    assert 0 < keep[:, 1].mean() < 1
    all_kept, _ = likely_needed(experts[:1], np.ones(4), scores[:1], (table, 1))
    assert all_kept.tolist() == [0, 1, 2]


def test_of_no_candidates_none_is_kept():
    none = np.full((2, 2), -1)
    table = GatingTable(np.array([[0.6]]))
    assert not kept_candidates(none, np.zeros((2, 2)), table, 0).any()
    experts, chance = likely_needed(none, np.ones(2))
    assert (len(experts), len(chance)) == (0, 0)


@pytest.mark.parametrize("n_tokens", [1, 3])
def test_candidates_are_distinct(n_tokens):
    predicted = np.array([[3, 1]] * n_tokens)
    experts, _ = likely_needed(predicted, np.array([0.5, 0.5]))
    assert sorted(experts.tolist()) == [1, 3]


@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, MOST_ISSUED - 1)), min_size=1))
def test_the_nearest_layer_goes_first_then_the_oldest(prefetches):
    assert sorted(prefetches, key=lambda one: priority(*one)) == sorted(prefetches)
    for layer, n_issued in prefetches:  # compiled loops keep priorities among floats
        assert int(float(priority(layer, n_issued))) == priority(layer, n_issued)
