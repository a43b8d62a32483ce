"""Curves of one pass against a replay at every cache size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import make_spec, make_trace

from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.policies.gating.uniform import UniformCut
from adapmoe_lab.simulation.replay.miss_curves import miss_curves
from adapmoe_lab.simulation.replay.replay import replay
from adapmoe_lab.simulation.replay.stack_loops import count_misses, empty_stack


def lru_misses(sets, n_slots):
    """Return the misses of one cache by the step rules, written out plainly."""
    resident, n_missed = [], 0  # least recent first
    for members in sets:
        hits = [e for e in sorted(members) if e in resident]
        misses = [e for e in sorted(members) if e not in resident]
        placed = misses[: n_slots - len(hits)]
        others = [e for e in resident if e not in members]
        n_kept = n_slots - len(hits) - len(placed)
        resident = others[len(others) - min(n_kept, len(others)) :] + hits + placed
        n_missed += len(misses)
    return n_missed


def counted(sets, n_experts):
    flat = [expert for members in sets for expert in sorted(members)]
    starts = np.cumsum([0, *map(len, sets)])
    growth = np.zeros(n_experts + 2, dtype=np.int64)
    count_misses(np.array(flat, dtype=np.int16), starts, empty_stack(n_experts), growth)
    return growth.cumsum()[:-1].tolist()


@settings(deadline=None, max_examples=400)
@given(st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=8), min_size=1, max_size=40))
def test_sets_of_any_size_equal_one_cache_after_another(sets):
    assert counted(sets, 8) == [lru_misses(sets, n_slots) for n_slots in range(9)]


@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.parametrize("is_gated", [False, True])
def test_curves_are_the_misses_of_a_replay_at_every_size(top_k, is_gated):
    spec = make_spec(n_layers=3, n_experts=12, top_k=top_k)
    trace = make_trace(spec, n_tokens=900)
    gating = UniformCut(trace).table(0.25) if is_gated and top_k > 1 else None
    curves = miss_curves(trace, gating)
    assert curves.shape == (3, 13)
    for n_slots in range(13):
        replayed = replay(trace, kept_experts(trace, gating), slots_plan(spec, n_slots))
        np.testing.assert_allclose(curves[:, n_slots], replayed.misses.mean(axis=0), rtol=1e-12)
