"""Ranks under a budget, against every division there is."""

from itertools import product

import numpy as np
import pytest
from drawn_surrogates import random_surrogates
from traces import make_spec

from adapmoe_lab.policies.allocation.ranks import affordable_ranks, ranks_by_benefit


@pytest.mark.parametrize("n_ranks", [0, 1, 5, 9, 20])
@pytest.mark.parametrize("seed", range(5))
def test_no_division_is_worth_more(n_ranks, seed):
    worth = -np.sort(-np.random.default_rng(seed).exponential(size=(3, 4)), axis=1)

    def total(ranks):
        return sum(worth[layer, :rank].sum() for layer, rank in enumerate(ranks))

    every = [ranks for ranks in product(range(5), repeat=3) if sum(ranks) <= n_ranks]
    found = ranks_by_benefit(worth, n_ranks)
    assert tuple(found) in every
    assert total(found) == pytest.approx(max(map(total, every)))


def test_layers_of_equal_worth_are_served_in_order():
    assert ranks_by_benefit(np.ones((3, 2)), 3).tolist() == [2, 1, 0]


def test_what_is_affordable_keeps_the_budget():
    spec = make_spec()

    def taken(n_ranks):
        ranks = [n_ranks, 0, 0]
        return random_surrogates(spec, ranks).n_bytes(2)

    for budget in (taken(0), taken(0) + 1, 5000, taken(5) - 1, taken(5)):
        n_ranks = affordable_ranks(spec, budget, 2)
        assert taken(n_ranks) <= budget < taken(n_ranks + 1)
    assert affordable_ranks(spec, 10**9, 2) == spec.n_layers * spec.hidden_size
    with pytest.raises(ValueError, match=r"100 bytes do not hold the least .* take 768 bytes"):
        affordable_ranks(spec, 100, 2)
