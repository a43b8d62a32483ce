"""The loops of a replay, compiled. Import it only where they run: numba takes a third of a second.

Machine code is kept in the user's cache folder, under a name made of the sources it comes from,
so that a new process does not compile again and a changed rule is never answered by old code.
Functions take one layer or one pool each and hold no lock, so that threads share the layers.
They take plain arrays: numba counts references to the parts of a tuple inside the loops.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core import config

from adapmoe_lab.policies import eviction
from adapmoe_lab.policies.eviction import (
    BELADY,
    HOBBIT,
    LEAST_STALE,
    LFU_AGED,
    ROUTER_AVERAGE,
)
from adapmoe_lab.records.files import cache_folder, digest

HIT, LOADED, STREAMED = range(3)

_SETTINGS: Any = config
_SOURCES = (__file__, eviction.__file__)


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called, or take it from the cache folder."""
    folder = cache_folder() / "compiled" / digest(*(Path(path).read_bytes() for path in _SOURCES))
    dispatcher = numba.njit(nogil=True)(function)
    elsewhere, _SETTINGS.CACHE_DIR = _SETTINGS.CACHE_DIR, str(folder)
    try:
        dispatcher.enable_caching()
    except RuntimeError:  # nowhere to write: every process compiles for itself
        return dispatcher
    finally:
        _SETTINGS.CACHE_DIR = elsewhere
    return dispatcher


_INLINED: Any = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_inlined: Callable[..., Any] = numba.njit(**_INLINED)

value_in_new_pass = _inlined(eviction.value_in_new_pass)
value_in_new_step = _inlined(eviction.value_in_new_step)
after_use = _inlined(eviction.after_use)
asks_high_precision = _inlined(eviction.asks_high_precision)
distance_malus = _inlined(eviction.distance_malus)

HALF = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
"""The number of every bit pattern of a float16, which numba does not know."""


@_compiled
def collect_sets(indices, keep, bounds, layer, last_step, members, starts):
    """Write down the distinct experts, ascending, that a layer needs in every step.

    Args:
        indices: int16 [T, L, K], the router's choice.
        keep: bool [T, L, K], which of them are run.
        bounds: int64 [N+1], first token of every step, and T.
        layer: which layer.
        last_step: int64 [E], -1 everywhere; working space.
        members: int16 [T K], filled with the sets one after another.
        starts: int64 [N+1], filled with where each set begins, and the last one ends.
    """
    n = 0
    for step in range(len(bounds) - 1):
        starts[step] = n
        for token in range(bounds[step], bounds[step + 1]):
            for k in range(indices.shape[2]):
                expert = indices[token, layer, k]
                if keep[token, layer, k] and last_step[expert] != step:
                    last_step[expert] = step
                    at = n
                    while at > starts[step] and members[at - 1] > expert:
                        members[at] = members[at - 1]
                        at -= 1
                    members[at] = expert
                    n += 1
    starts[len(bounds) - 1] = n


@_compiled
def next_uses(members, starts, layer, n_layers, upcoming, following):
    """Fill `following` [T K] with the time of every member's next use.

    Times count the steps of all `n_layers` layers of a pool; `layer` is the number in it.
    `upcoming` [E] holds a time after the last step everywhere; working space.
    """
    for step in range(len(starts) - 2, -1, -1):
        for i in range(starts[step], starts[step + 1]):
            following[i] = upcoming[members[i]]
        for i in range(starts[step], starts[step + 1]):
            upcoming[members[i]] = step * n_layers + layer


@_inlined
def _mean_scores(bits, half, first, end, layer, scores):
    """Fill `scores` [E] with the mean router scores of tokens first..end-1."""
    for expert in range(len(scores)):
        scores[expert] = half[bits[first, layer, expert]]
    for token in range(first + 1, end):
        for expert in range(len(scores)):
            scores[expert] += half[bits[token, layer, expert]]
    if end > first + 1:
        for expert in range(len(scores)):
            scores[expert] /= end - first


@_inlined
def _high_precision_use(members, layer, first, end, scores, own):
    """Return 1 if HOBBIT would load the expert `own` of a set in high precision, else 0."""
    total, above = 0.0, 0.0
    for i in range(first, end):
        score = scores[members[layer, i]]
        total += score
        if score > scores[own]:
            above += score
    return int(asks_high_precision(above, total))


@_inlined
def _find_lowest(values, barred, lowest, lowest_value, layer):
    """Find the expert of a layer that would leave first, ties to the lowest id."""
    at, least = -1, np.inf
    for expert in range(values.shape[1]):
        value = values[layer, expert] + barred[layer, expert]
        if value < least:
            at, least = expert, value
    lowest[layer], lowest_value[layer] = at, least


@_inlined
def _begin_pass(values, barred, lowest, lowest_value):
    """Change the values that change as a forward pass begins; only least-stale's do."""
    for layer in range(len(values)):
        for expert in range(values.shape[1]):
            values[layer, expert] = value_in_new_pass(LEAST_STALE, values[layer, expert])
        _find_lowest(values, barred, lowest, lowest_value, layer)


@_inlined
def _layer_to_leave(rule, lowest_value, layer, clock):
    """Return the layer whose lowest expert leaves first, ties to the lowest layer."""
    n_layers = len(lowest_value)
    at, least = 0, np.inf
    if rule == HOBBIT:
        for other in range(n_layers):
            ahead = other - layer if other >= layer else other - layer + n_layers
            value = lowest_value[other] - distance_malus(rule, ahead, clock, n_layers)
            if value < least:
                at, least = other, value
    else:
        for other in range(n_layers):
            if lowest_value[other] < least:
                at, least = other, lowest_value[other]
    return at


@_inlined
def _let_go(values, resident, barred, lowest, lowest_value, members, layer, first, end, pinned):
    """Let a step's members leave again, keeping the layer's lowest expert up to date."""
    for i in range(first, end):
        expert = members[layer, i]
        if resident[layer, expert] and not pinned[layer, expert]:
            barred[layer, expert] = 0
            value, least, at = values[layer, expert], lowest_value[layer], lowest[layer]
            if value < least or (value == least and expert < at):
                lowest[layer], lowest_value[layer] = expert, value


@_compiled
def replay_pool(
    rule, n_slots, first_layer, members, starts, following, bits, half, bounds, pinned, state, out
):
    """Replay every step of the layers that share a pool of slots.

    The inner loop is one function on purpose: it runs a million times for a long trace.

    Args:
        rule: of the eviction policy.
        n_slots: slots of the pool.
        first_layer: number of the pool's first layer among the model's.
        members: int16 [L, T K], the sets of the pool's layers, as `collect_sets` gives them.
        starts: int64 [L, N+1], where each set begins.
        following: int64 [L, T K], times of the members' next use, read by Belady only.
        bits: uint16 [T, L of the model, E], the router's scores as the bits of float16, read by
            rules that need them.
        half: `HALF`.
        bounds: int64 [N+1], first token of every step, and T.
        pinned: bool [L, E], experts that never leave.
        state: what `empty_pool` returns.
        out: int64 [L, 3, N], filled with hits, loads and streamed experts.
    """
    values, memory, resident, barred, lowest, lowest_value, missing, scores = state
    n_layers, n_experts = values.shape
    moves_all = rule in (LFU_AGED, ROUTER_AVERAGE)
    n_free, n_may_leave, clock = n_slots, 0, 0
    for step in range(len(bounds) - 1):
        for layer in range(n_layers):
            first, end = starts[layer, step], starts[layer, step + 1]
            if rule in (ROUTER_AVERAGE, HOBBIT):
                _mean_scores(
                    bits, half, bounds[step], bounds[step + 1], first_layer + layer, scores
                )
            if rule == LEAST_STALE and layer == 0:
                _begin_pass(values, barred, lowest, lowest_value)
            for expert in range(n_experts if moves_all else 0):
                value = values[layer, expert]
                values[layer, expert] = value_in_new_step(rule, value, scores[expert])
            n_missing, n_barred, is_lowest_known = 0, 0, not moves_all
            for i in range(first, end):
                expert = members[layer, i]
                if barred[layer, expert] == 0:
                    barred[layer, expert] = np.inf
                    n_barred += 1
                    is_lowest_known &= expert != lowest[layer]
                was_resident, hint = int(resident[layer, expert]), 0
                missing[n_missing] = expert
                n_missing += 1 - was_resident
                if rule == BELADY:
                    hint = following[layer, i]
                elif rule == HOBBIT:
                    hint = _high_precision_use(members, layer, first, end, scores, expert)
                values[layer, expert], memory[layer, expert] = after_use(
                    rule, values[layer, expert], memory[layer, expert], was_resident, hint,
                    clock, n_layers,
                )  # fmt: skip
            if not is_lowest_known:
                _find_lowest(values, barred, lowest, lowest_value, layer)
            n_loads = min(n_missing, n_free + n_may_leave - n_barred)
            for number in range(n_loads):
                if n_free > 0:
                    n_free -= 1
                else:
                    at = _layer_to_leave(rule, lowest_value, layer, clock)
                    resident[at, lowest[at]] = False
                    barred[at, lowest[at]] = np.inf
                    _find_lowest(values, barred, lowest, lowest_value, at)
                    n_may_leave -= 1
                resident[layer, missing[number]] = True
                n_may_leave += not pinned[layer, missing[number]]
            _let_go(
                values, resident, barred, lowest, lowest_value, members, layer, first, end, pinned
            )
            out[layer, 0, step] = end - first - n_missing
            out[layer, 1, step] = n_loads
            out[layer, 2, step] = n_missing - n_loads
            clock += 1


def empty_pool(n_layers: int, n_experts: int) -> tuple[np.ndarray, ...]:
    """Return what a pool keeps of its layers' experts, with no expert resident.

    In order: values [L, E] by which experts leave; memory [L, E] that some rules keep; whether an
    expert is resident [L, E]; 0 for one that may leave and infinity for one that may not [L, E];
    each layer's expert that would leave first [L], and its value; room for the missing experts
    and for the scores of one step.
    """
    shape = (n_layers, n_experts)
    return (
        np.zeros(shape),
        np.zeros(shape),
        np.zeros(shape, dtype=np.bool_),
        np.full(shape, np.inf),
        np.full(n_layers, -1),
        np.full(n_layers, np.inf),
        np.zeros(n_experts + 1, dtype=np.int64),
        np.zeros(n_experts),
    )


@_inlined
def _outcome(outcomes, sizes, miss_up_to, hit_from, expert, n_slots):
    """Return what an expert's last use was with so many slots: HIT, LOADED or STREAMED."""
    if n_slots >= sizes[expert]:
        if n_slots >= hit_from[expert]:
            return HIT
        if n_slots <= miss_up_to[expert]:
            return LOADED
    return outcomes[expert, n_slots]


@_inlined
def _find_in_group(order, first, end, is_hit, outcomes, sizes, miss_up_to, hit_from):
    """Find for which numbers of slots the experts in order[first:end] are still resident.

    They were last used in one step, and `first` others since. With `end` slots or more all are
    resident, with `first` or fewer none is; in between the order within their step decides:
    misses after hits, ascending; who was streamed is not there at all.
    """
    for n_slots in range(first + 1, end):
        rank = first
        for kind in (LOADED, HIT):
            for i in range(end - 1, first - 1, -1):
                expert = order[i]
                outcome = _outcome(outcomes, sizes, miss_up_to, hit_from, expert, n_slots)
                if outcome == kind:
                    rank += 1
                    is_hit[expert, n_slots] = rank <= n_slots
                elif outcome == STREAMED:
                    is_hit[expert, n_slots] = False


@_inlined
def _note_outcomes(members, first, end, miss_up_to, hit_from, is_hit, outcomes):
    """Write down what the members of a step were, wherever the two bounds do not say it."""
    for i in range(first, end):
        expert = members[i]
        for n_slots in range(miss_up_to[expert] + 1, hit_from[expert]):
            outcomes[expert, n_slots] = HIT if is_hit[expert, n_slots] else LOADED
    for n_slots in range(end - first):
        room = n_slots
        for i in range(first, end):
            expert = members[i]
            outcomes[expert, n_slots] = STREAMED
            if n_slots >= hit_from[expert] or (
                n_slots > miss_up_to[expert] and is_hit[expert, n_slots]
            ):
                outcomes[expert, n_slots] = HIT
                room -= 1
        for i in range(first, end):
            if room > 0 and outcomes[members[i], n_slots] == STREAMED:
                outcomes[members[i], n_slots] = LOADED
                room -= 1


@_inlined
def _bring_forward(order, n_used, members, first, end, n_new, at, last_step, step, kept):
    """Move a step's members, the last of which stood before `at`, to the front of the order."""
    n_kept = 0
    for i in range(at):
        if last_step[order[i]] != step:
            kept[n_kept] = order[i]
            n_kept += 1
    for i in range(n_used - 1, at - 1 if n_new > 0 else n_used, -1):
        order[i + n_new] = order[i]
    for i in range(end - first):
        order[i] = members[first + i]
    for i in range(n_kept):
        order[end - first + i] = kept[i]


@_compiled
def count_misses(members, starts, stack, growth):
    """Count the misses of one layer's LRU cache with 0..E slots, in one pass for all of them.

    An LRU cache holds the experts used last. Which those are depends on the number of slots only
    by the order within a step, which puts misses after hits. So an expert is resident if there
    are more slots than experts used since its step; only as many numbers of slots as experts were
    used in that step have to be looked at one by one.

    Args:
        members: int16 [T K], the sets of the layer, as `collect_sets` gives them.
        starts: int64 [N+1], where each set begins.
        stack: what `empty_stack` returns.
        growth: int64 [E+2] of zeros, filled with how much the misses grow with each slot more.
    """
    order, kept, wanted_in, last_step, sizes, miss_up_to, hit_from, is_hit, outcomes = stack
    n_experts, n_used = len(order), 0
    for step in range(len(starts) - 1):
        first, end = starts[step], starts[step + 1]
        n_new = 0
        for i in range(first, end):
            expert = members[i]
            wanted_in[expert] = step
            if last_step[expert] < 0:
                n_new += 1
                miss_up_to[expert], hit_from[expert] = n_experts, n_experts + 1
        at, n_left = 0, end - first - n_new
        while n_left > 0:
            group, n_before = at, n_left
            while at < n_used and last_step[order[at]] == last_step[order[group]]:
                n_left -= wanted_in[order[at]] == step
                at += 1
            if n_left < n_before:
                _find_in_group(order, group, at, is_hit, outcomes, sizes, miss_up_to, hit_from)
                for i in range(group, at):
                    if wanted_in[order[i]] == step:
                        miss_up_to[order[i]], hit_from[order[i]] = group, at
        _note_outcomes(members, first, end, miss_up_to, hit_from, is_hit, outcomes)
        for i in range(first, end):
            expert = members[i]
            last_step[expert], sizes[expert] = step, end - first
            growth[0] += 1
            growth[miss_up_to[expert] + 1] -= 1
            for n_slots in range(miss_up_to[expert] + 1, hit_from[expert]):
                if not is_hit[expert, n_slots]:
                    growth[n_slots] += 1
                    growth[n_slots + 1] -= 1
        _bring_forward(order, n_used, members, first, end, n_new, at, last_step, step, kept)
        n_used += n_new


def empty_stack(n_experts: int) -> tuple[np.ndarray, ...]:
    """Return what `count_misses` keeps of a layer's experts, with none used yet.

    In order: the experts used, last ones first [E]; room for as many; the step that wants an
    expert, and the last one that used it [E]; how many experts that one used [E]; up to how many
    slots it then was a miss, and from how many on a hit [E]; in between, whether it is a hit in
    the present step and what it was in its last one [E, E+1].
    """
    each, sizes = (n_experts,), (n_experts, n_experts + 1)
    return (
        np.zeros(each, dtype=np.int64),
        np.zeros(each, dtype=np.int64),
        np.full(each, -1),
        np.full(each, -1),
        np.zeros(each, dtype=np.int64),
        np.full(each, n_experts),
        np.full(each, n_experts + 1),
        np.zeros(sizes, dtype=np.bool_),
        np.zeros(sizes, dtype=np.int8),
    )
