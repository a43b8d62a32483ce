"""Statistics of expert use, against counting by hand."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import make_spec, make_trace

from adapmoe_lab.simulation.statistics.routing_patterns import (
    co_activation,
    counts_by_label,
    effective_experts,
    expert_use,
    label_information,
    locality,
    locality_by_chance,
    pairs_given_use,
    tokens_after,
    use_by_sequence,
)


def sets_of(trace, layer):
    return [set(row.tolist()) for row in trace.expert_indices[:, layer]]


@pytest.mark.parametrize("distance", [1, 3, 20])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_locality_compares_tokens_of_one_sequence_only(distance, top_k):
    trace = replace(
        make_trace(make_spec(top_k=top_k), n_tokens=70),
        sequence_starts=[0, 1, 25, 60],
        labels=tuple("abcd"),
    )
    found = locality(trace.expert_indices, trace.sequence_starts, distance)
    for layer in range(trace.spec.n_layers):
        sets = sets_of(trace, layer)
        shares = [
            len(sets[t] & sets[t - distance]) / top_k
            for start, end in ((0, 1), (1, 25), (25, 60), (60, 70))
            for t in range(start + distance, end)
        ]
        assert found[layer] == pytest.approx(np.mean(shares))


def test_a_distance_no_sequence_spans_is_refused():
    assert tokens_after(10, [0, 4], 5).tolist() == [9]
    with pytest.raises(ValueError, match=r"one 6 before it, but no .* more than 6 tokens"):
        tokens_after(10, [0, 4], 6)


def test_locality_by_chance_is_that_of_all_pairs():
    trace = make_trace(make_spec(top_k=3), n_tokens=40)
    chance = locality_by_chance(expert_use(trace.expert_indices, 8))
    for layer in range(3):
        sets = sets_of(trace, layer)
        every_pair = [len(a & b) / 3 for a, b in itertools.product(sets, sets)]
        assert chance[layer] == pytest.approx(np.mean(every_pair))


@pytest.mark.parametrize("top_k", [2, 4])
def test_co_activation_counts_tokens_that_use_both(top_k):
    trace = make_trace(make_spec(n_experts=6, top_k=top_k), n_tokens=50)
    together = co_activation(trace.expert_indices[:, 1], 6)
    for a, b in itertools.product(range(6), range(6)):
        by_hand = sum({a, b} <= chosen for chosen in sets_of(trace, 1)) if a != b else 0
        assert together[a, b] == by_hand


@given(st.lists(st.integers(1, 20), min_size=4, max_size=9))
def test_pairs_in_proportion_to_their_experts_are_explained_by_use(weights):
    pairs = np.outer(weights, weights)
    np.fill_diagonal(pairs, 0)
    assert pairs_given_use(pairs) == pytest.approx(pairs, rel=1e-6)


def test_pairs_given_use_keep_the_use_of_every_expert():
    trace = make_trace(make_spec(n_experts=8, top_k=3), n_tokens=300)
    together = co_activation(np.minimum(trace.expert_indices[:, 0], 6), 8)  # nothing uses 7
    expected = pairs_given_use(together)
    assert expected.sum(axis=1) == pytest.approx(together.sum(axis=1))
    assert expected == pytest.approx(expected.T)
    assert not expected[7].any()


def test_use_is_counted_by_sequence_and_by_label():
    trace = replace(make_trace(n_tokens=30), sequence_starts=[0, 5, 17], labels=tuple("aba"))
    by_sequence = use_by_sequence(trace)
    for sequence, tokens in enumerate((range(5), range(5, 17), range(17, 30))):
        for layer, expert in itertools.product(range(3), range(8)):
            n = sum(expert in trace.expert_indices[t, layer] for t in tokens)
            assert by_sequence[sequence, layer, expert] == n
    by_label = counts_by_label(by_sequence, [0, 1, 0], 2)
    assert by_label.shape == (3, 2, 8)
    assert np.array_equal(by_label[:, 0], by_sequence[0] + by_sequence[2])
    assert by_label.sum(axis=1) / 30 == pytest.approx(expert_use(trace.expert_indices, 8))


@given(
    st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=2, max_size=4).filter(
        lambda rows: sum(map(sum, rows)) > 0
    )
)
def test_information_is_its_definition(rows):
    total = sum(map(sum, rows))
    by_definition = sum(
        n / total * math.log2(n * total / (sum(row) * sum(r[column] for r in rows)))
        for row in rows
        for column, n in enumerate(row)
        if n
    )
    assert label_information(np.array(rows)) == pytest.approx(by_definition, abs=1e-9)


def test_information_of_experts_for_one_kind_each_settles_the_kind():
    counts = np.array([[[5, 5, 0, 0], [0, 0, 5, 5]], [[3, 3, 3, 3], [3, 3, 3, 3]]])
    assert label_information(counts) == pytest.approx([1.0, 0.0])


def test_effective_experts_are_the_even_ones_of_the_same_entropy():
    use = np.array([[0.5, 0.5, 0.5, 0.5], [1, 1, 0, 0], [1, 0.5, 0.5, 0]])
    assert effective_experts(use) == pytest.approx([4, 2, 2 * 2**0.5])
