"""The misses of every cache size in one pass, compiled. Import it only where it runs."""

from __future__ import annotations

import numpy as np

from adapmoe_lab.simulation.compiled import compiled, inlined
from adapmoe_lab.simulation.replay.outcomes import HIT, LOAD, STREAM


@inlined
def _outcome(outcomes, sizes, miss_up_to, hit_from, expert, n_slots):
    """Return what an expert's last use was with so many slots: HIT, LOAD or STREAM."""
    if n_slots >= sizes[expert]:
        if n_slots >= hit_from[expert]:
            return HIT
        if n_slots <= miss_up_to[expert]:
            return LOAD
    return outcomes[expert, n_slots]


@inlined
def _find_in_group(order, first, end, is_hit, outcomes, sizes, miss_up_to, hit_from):
    """Find for which numbers of slots the experts in order[first:end] are still resident.

    They were last used in one step, and `first` others since. With `end` slots or more all are
    resident, with `first` or fewer none is; in between the order within their step decides:
    misses after hits, ascending; who was streamed is not there at all.
    """
    for n_slots in range(first + 1, end):
        rank = first
        for kind in (LOAD, HIT):
            for i in range(end - 1, first - 1, -1):
                expert = order[i]
                outcome = _outcome(outcomes, sizes, miss_up_to, hit_from, expert, n_slots)
                if outcome == kind:
                    rank += 1
                    is_hit[expert, n_slots] = rank <= n_slots
                elif outcome == STREAM:
                    is_hit[expert, n_slots] = False


@inlined
def _note_outcomes(members, first, end, miss_up_to, hit_from, is_hit, outcomes):
    """Write down what the members of a step were, wherever the two bounds do not tell."""
    for i in range(first, end):
        expert = members[i]
        for n_slots in range(miss_up_to[expert] + 1, hit_from[expert]):
            outcomes[expert, n_slots] = HIT if is_hit[expert, n_slots] else LOAD
    for n_slots in range(end - first):
        room = n_slots
        for i in range(first, end):
            expert = members[i]
            outcomes[expert, n_slots] = STREAM
            if n_slots >= hit_from[expert] or (
                n_slots > miss_up_to[expert] and is_hit[expert, n_slots]
            ):
                outcomes[expert, n_slots] = HIT
                room -= 1
        for i in range(first, end):
            if room > 0 and outcomes[members[i], n_slots] == STREAM:
                outcomes[members[i], n_slots] = LOAD
                room -= 1


@inlined
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


@compiled
def count_misses(members, starts, stack, growth):
    """Count the misses of one layer's LRU cache with 0..E slots, in one pass for all of them.

    An LRU cache holds the experts used last. Which those are depends on the number of slots only
    by the order within a step, which puts misses after hits. So an expert is resident if there
    are more slots than experts used since its step; only as many numbers of slots as experts were
    used in that step have to be looked at one by one.

    Args:
        members: int16 [T K], the sets of the layer, as `collect_sets` gives them.
        starts: int32 [N+1], where each set begins.
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
