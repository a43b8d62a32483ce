"""The loops of a replay, compiled for one policy. Import it only where they run: it imports numba.

Functions take one layer or one pool each, so that threads share the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from typing import Any

from adapmoe_lab.policies.eviction.policy import PROTECTED, EvictionPolicy, Use
from adapmoe_lab.simulation.compiled import CompiledFunction, compiled, inlined
from adapmoe_lab.simulation.replay.outcomes import HIT, LOAD, STREAM
from adapmoe_lab.simulation.replay.pool_steps import (
    evict,
    find_lowest,
    mean_scores,
    note_absent,
    release,
    set_penalty,
    sum_scores,
)

N_KEPT = 64
"""Policies whose loops a process keeps, the last ones used."""

_BUILDING = Lock()
"""Held while loops are built, so that threads that want the same ones share them."""


def pool_replay(policy: EvictionPolicy) -> CompiledFunction:
    """Return the function that replays a pool under a policy, `replay_pool` below."""
    with _BUILDING:
        return _pool_replay(policy)


def score_oracle(oracle_input: Callable[[Any, int], Any]) -> CompiledFunction:
    """Return the function that fills in a policy's oracle inputs, `fill_oracle_inputs` below."""
    with _BUILDING:
        return _score_oracle(oracle_input)


@lru_cache(N_KEPT)
def _score_oracle(oracle_input: Callable[[Any, int], Any]) -> CompiledFunction:
    of_member = inlined(oracle_input)

    @compiled
    def fill_oracle_inputs(steps, scores, at, sums, of_set):
        """Fill in the oracle input of every member of the sets of layer `at` of the pool.

        `sums` [E] and `of_set` [E] are working space.
        """
        bounds, members, starts = steps.bounds, steps.members[at], steps.starts[at]
        for step in range(len(bounds) - 1):
            first, end = starts[step], starts[step + 1]
            sum_scores(scores, bounds[step], bounds[step + 1], steps.first_layer + at, sums)
            for i in range(first, end):
                of_set[i - first] = sums[members[i]]
            for own in range(end - first):
                steps.oracle_inputs[at, first + own] = of_member(of_set[: end - first], own)

    return fill_oracle_inputs


def _unchanged(priority, score=0):
    """Return a priority that the policy leaves as it is."""
    return priority


def _no_penalty(n_passes):
    """Return what a policy without a penalty takes off."""
    return 0


@lru_cache(N_KEPT)
def _pool_replay(policy: EvictionPolicy) -> CompiledFunction:
    # Long on purpose: the inner loop runs a million times for a long trace, so it is one function,
    # in which the compiler folds away the branches that the constants of the policy decide.
    after_use = inlined(policy.after_use)
    on_new_pass = inlined(policy.on_new_pass or _unchanged)
    on_new_step = inlined(policy.on_new_step or _unchanged)
    on_scores = inlined(policy.on_scores or _unchanged)
    penalty_per_layer = inlined(policy.penalty_per_layer or _no_penalty)
    changes_in_pass = policy.on_new_pass is not None
    reads_scores = policy.on_scores is not None
    changes_in_step = policy.on_new_step is not None or reads_scores
    has_penalty = policy.penalty_per_layer is not None
    has_oracle = policy.oracle_input is not None
    keeps_state = policy.keeps_state

    @inlined
    def begin_pass(pool, step):
        for layer in range(len(pool.priorities)):
            if changes_in_pass:
                for expert in range(pool.priorities.shape[1]):
                    pool.priorities[layer, expert] = on_new_pass(pool.priorities[layer, expert])
                find_lowest(pool, layer)
            if has_penalty:
                set_penalty(pool, layer, layer * penalty_per_layer(step))

    @inlined
    def begin_step(pool, layer):
        for expert in range(pool.priorities.shape[1]):
            priority = on_new_step(pool.priorities[layer, expert])
            pool.priorities[layer, expert] = on_scores(priority, pool.scores[expert])

    @inlined
    def note_use(pool, layer, expert, use):
        states = pool.states[layer]
        pool.priorities[layer, expert], state = after_use(
            pool.priorities[layer, expert], states[expert], use
        )
        if keeps_state:
            states[expert] = state

    @compiled
    def replay_pool(n_slots, pool, steps, scores, predicted, counts, outcomes):
        """Replay every step of the layers that share a pool of slots.

        Args:
            n_slots: slots of the pool.
            pool: an `empty_pool`, changed.
            steps: what the layers need, see `pool.Steps`.
            scores: read by policies that need them, see `pool.Scores`.
            predicted: whose absence is noted, see `pool.Predicted`.
            counts: int16 [N, L, 3], filled with hits, loads and streamed experts.
            outcomes: int8 [L, T K], filled with what becomes of each member: HIT, LOAD or STREAM.
        """
        bounds, members, starts, oracle_inputs, first_layer = steps
        distances, n_layers = predicted.distances, len(pool.priorities)
        n_free, n_may_leave, clock = n_slots, 0, 0
        for step in range(len(bounds) - 1):
            for layer in range(n_layers):
                first, end = starts[layer, step], starts[layer, step + 1]
                if layer == 0 and (changes_in_pass or has_penalty):
                    begin_pass(pool, step)
                for j in range(len(distances)):
                    if n_layers == 1 or (layer == 0 and distances[j] == 0):
                        note_absent(predicted, j, step, first_layer + layer, pool.resident[layer])
                if reads_scores:
                    of_model = first_layer + layer
                    mean_scores(scores, bounds[step], bounds[step + 1], of_model, pool.scores)
                if changes_in_step:
                    begin_step(pool, layer)
                n_missing, n_protected, is_lowest_known = 0, 0, not changes_in_step
                for i in range(first, end):
                    expert = members[layer, i]
                    if pool.protected[layer, expert] == 0:
                        pool.protected[layer, expert] = PROTECTED
                        n_protected += 1
                        is_lowest_known &= expert != pool.lowest[layer]
                    was_resident = int(pool.resident[layer, expert])
                    outcomes[layer, i] = HIT if was_resident else STREAM
                    pool.missing[n_missing] = i
                    n_missing += 1 - was_resident
                    oracle_input = oracle_inputs[layer, i] if has_oracle else 0
                    use = Use(was_resident, oracle_input, clock, n_layers, step)
                    note_use(pool, layer, expert, use)
                if not is_lowest_known:
                    find_lowest(pool, layer)
                n_loads = min(n_missing, n_free + n_may_leave - n_protected)
                for number in range(n_loads):
                    if n_free > 0:
                        n_free -= 1
                    else:
                        evict(pool)
                        n_may_leave -= 1
                    expert = members[layer, pool.missing[number]]
                    outcomes[layer, pool.missing[number]] = LOAD
                    pool.resident[layer, expert] = True
                    n_may_leave += not pool.pinned[layer, expert]
                for j in range(len(distances) if n_layers > 1 else 0):
                    at = layer + distances[j]
                    if distances[j] > 0 and at < n_layers:
                        note_absent(predicted, j, step, at, pool.resident[at])
                if has_penalty:
                    set_penalty(pool, layer, (layer + n_layers) * penalty_per_layer(step))
                release(pool, members, layer, first, end)
                counts[step, layer, 0] = end - first - n_missing
                counts[step, layer, 1] = n_loads
                counts[step, layer, 2] = n_missing - n_loads
                clock += 1

    return replay_pool
