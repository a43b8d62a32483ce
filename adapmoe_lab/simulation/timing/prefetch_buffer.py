"""The prefetch buffer, compiled: which experts are in it, which goes next, which are issued.

A buffer is a float64 array [entries, 6], whose places `clock_arrays` names.
"""

from __future__ import annotations

from adapmoe_lab.policies.prefetch import expected_gain as prefetch
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.step_costs import N_CHUNKS
from adapmoe_lab.simulation.compiled import called, inlined
from adapmoe_lab.simulation.replay.outcomes import HIT
from adapmoe_lab.simulation.timing.clock_arrays import (
    BEGUN,
    ISSUED_AT,
    LAYER,
    LINK_FREE,
    MEMBER,
    N_ISSUED,
    NOW,
    PRIORITY,
    SECONDS,
)

needed_at = inlined(prefetch.needed_at)
priority = inlined(prefetch.priority)
expected_gain_s = inlined(prefetch.expected_gain_s)

TOKEN, EXPERTS_INPUT = int(HookPoint.TOKEN), int(HookPoint.EXPERTS_INPUT)
LAYER_OUTPUT, LAST_HIDDEN = int(HookPoint.LAYER_OUTPUT), int(HookPoint.LAST_HIDDEN)


@inlined
def next_in_line(entries):
    """Return the entry whose next chunk goes first, or -1."""
    at = -1
    for entry in range(len(entries)):
        is_waiting = entries[entry, LAYER] >= 0 and entries[entry, BEGUN] < N_CHUNKS
        if is_waiting and (at < 0 or entries[entry, PRIORITY] < entries[at, PRIORITY]):
            at = entry
    return at


@inlined
def entry_with(entries, layer, expert):
    """Return the entry of the buffer that an expert has, or -1."""
    for entry in range(len(entries)):
        if entries[entry, LAYER] == layer and entries[entry, MEMBER] == expert:
            return entry
    return -1


@inlined
def begins_at(clock):
    """Return when the link can begin with what is issued now, if nothing is demanded."""
    return max(clock[NOW], clock[LINK_FREE])


@inlined
def _is_open(j, step, target, absent, entries):
    """Whether a layer has absent candidates, or earlier prefetches that are not begun."""
    is_open = False
    for c in range(absent.shape[3]):
        is_open |= absent[j, step, target, c]
    for entry in range(len(entries)):
        is_open |= entries[entry, LAYER] == target and entries[entry, BEGUN] == 0
    return is_open


@inlined
def query_predictors(
    hook_point, layer, step, link_ready_at, layer_ready_at, layer_experts_s,
    predictions, clock, costs, loads, entries,
):  # fmt: skip
    """Query all predictors of a hook point, and issue the prefetches that are worth it.

    `step` is the step that the candidates are of; `link_ready_at` is when the link can begin,
    `layer_ready_at` when the layer is done, and `layer_experts_s` what the experts of a layer take.
    """
    n_layers, n_queries = len(loads.chunk), 0
    for j in range(len(predictions.hook_points)):
        is_here = predictions.hook_points[j] == hook_point
        n_queries += is_here and layer + predictions.distances[j] < n_layers
    if n_queries > 0:
        clock[NOW] += costs.predict_overhead_s + (
            costs.predict_output_overhead_s if hook_point == LAYER_OUTPUT else 0.0
        )
        clock[NOW] += n_queries * costs.predict_s
    for j in range(len(predictions.hook_points)):
        target = layer + predictions.distances[j]
        is_queried = predictions.hook_points[j] == hook_point and target < n_layers
        if is_queried and _is_open(j, step, target, predictions.absent, entries):
            distance = max(1, predictions.distances[j])
            needed_at_s = needed_at(layer_ready_at, distance, costs.dense_layer_s, layer_experts_s)
            _issue_prefetches(
                j, step, target, link_ready_at, needed_at_s, predictions, clock, loads, entries
            )


@called
def _issue_prefetches(
    j, step, target, link_ready_at, needed_at_s, predictions, clock, loads, entries
):
    """Issue the prefetches of a predictor that are worth it, instead of earlier ones not begun."""
    experts, probability = predictions.experts, predictions.probability
    n_candidates, p = experts.shape[3], step if probability.shape[1] > 1 else 0
    for entry in range(len(entries)):
        if entries[entry, LAYER] == target and entries[entry, BEGUN] == 0:
            is_candidate = False
            for c in range(n_candidates):
                is_candidate |= experts[j, step, target, c] == entries[entry, MEMBER]
            if not is_candidate:
                entries[entry, LAYER] = -1
    for c in range(n_candidates):
        expert = experts[j, step, target, c]
        is_absent = expert >= 0 and predictions.absent[j, step, target, c]
        if not is_absent or entry_with(entries, target, expert) >= 0:
            continue
        starts_at, at = link_ready_at, -1
        for entry in range(len(entries) - 1, -1, -1):
            if entries[entry, LAYER] < 0:
                at = entry
        if at < 0:
            break
        for entry in range(len(entries)):
            if 0 <= entries[entry, LAYER] <= target:
                layer, other = int(entries[entry, LAYER]), int(entries[entry, MEMBER])
                starts_at += loads.remaining[layer, other, int(entries[entry, BEGUN]), SECONDS]
        load_s = loads.remaining[target, expert, 0, SECONDS]
        chunk_s = loads.chunk[target, expert, 0, SECONDS]
        chance = probability[j, p, target, c]
        if expected_gain_s(chance, starts_at, needed_at_s, load_s, chunk_s) > 0:
            entries[at, LAYER], entries[at, MEMBER], entries[at, BEGUN] = target, expert, 0
            entries[at, ISSUED_AT] = clock[NOW]
            entries[at, PRIORITY] = priority(target, clock[N_ISSUED])
            clock[N_ISSUED] += 1


@inlined
def resolve(entries, layer, sets, first, end, entry_of):
    """Find the missing members first..end-1 in the buffer, and cancel the layer's other prefetches.

    Fills `entry_of`, from its start, with the member's entry or -1; returns how many prefetches
    were begun for nothing.
    """
    n_wasted = 0
    for i in range(end - first):
        is_missing = sets.outcomes[layer, first + i] != HIT
        entry_of[i] = (
            entry_with(entries, layer, sets.members[layer, first + i]) if is_missing else -1
        )
        if entry_of[i] >= 0 and entries[entry_of[i], BEGUN] == 0:
            entry_of[i] = -1
    for entry in range(len(entries)):
        if entries[entry, LAYER] == layer:
            is_needed = False
            for i in range(end - first):
                is_needed |= entry_of[i] == entry
            if not is_needed:
                n_wasted += entries[entry, BEGUN] > 0
                entries[entry, LAYER] = -1
    return n_wasted
