"""The buffer of experts fetched ahead, compiled: who is in it, who goes next, who is asked for.

A buffer is a float64 array [entries, 6]; what its columns hold is named below.
"""

from __future__ import annotations

from adapmoe_lab.policies.prefetch import expected_gain as prefetch
from adapmoe_lab.policies.prefetch.expected_gain import N_CHUNKS
from adapmoe_lab.records.prefetch import HookPoint
from adapmoe_lab.simulation.compiled import called, inlined
from adapmoe_lab.simulation.replay.outcomes import HIT

needed_at = inlined(prefetch.needed_at)
expected_gain_s = inlined(prefetch.expected_gain_s)

TOKEN, EXPERTS_INPUT = int(HookPoint.TOKEN), int(HookPoint.EXPERTS_INPUT)
LAYER_OUTPUT, LAST_HIDDEN = int(HookPoint.LAYER_OUTPUT), int(HookPoint.LAST_HIDDEN)

NOW, LINK_FREE, N_ISSUED, N_BYTES, LINK_S, N_LOGGED = range(6)
"""Places in the clock's state: the time, when the link is free, how many experts were asked for
ahead, the bytes that crossed and the seconds they took, the events written down."""

SECONDS, BYTES = range(2)
(
    DENSE_LAYER_S, HEAD_S, MISS_S, WAIT_S, PREDICT_S, CHUNK_S, PREDICT_OVERHEAD_S,
    PREDICT_OUTPUT_OVERHEAD_S,
) = range(8)  # fmt: skip
"""Places in the pace, as `timeline.StepCosts` names them."""

LAYER, MEMBER, BEGUN, ISSUED_AT, ORDER, ARRIVAL = range(6)
"""Places in an entry of the buffer: its layer, -1 if it is free, and expert; chunks begun; when it
was issued, and as which; when the last chunk begun arrives."""


@inlined
def next_in_line(entries):
    """Return the entry whose next chunk goes first, or -1: nearest layer first, then oldest."""
    at = -1
    for entry in range(len(entries)):
        if entries[entry, LAYER] >= 0 and entries[entry, BEGUN] < N_CHUNKS:
            is_older = (
                entries[entry, LAYER] == entries[at, LAYER]
                and entries[entry, ORDER] < entries[at, ORDER]
            )
            if at < 0 or entries[entry, LAYER] < entries[at, LAYER] or is_older:
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
    """Return when the link can begin with what is asked for now, if nothing is demanded."""
    return max(clock[NOW], clock[LINK_FREE])


@inlined
def _is_open(j, step, target, absent, entries):
    """Whether a layer has candidates of absent experts, or earlier ones that are not begun."""
    is_open = False
    for c in range(absent.shape[3]):
        is_open |= absent[j, step, target, c]
    for entry in range(len(entries)):
        is_open |= entries[entry, LAYER] == target and entries[entry, BEGUN] == 0
    return is_open


@inlined
def query_predictors(
    hook_point, layer, step, first_begins_at, ready_at, layer_experts_s, n_layers,
    hook_points, distances, predicted, probability, absent, clock, pace, rest, chunk, entries,
):  # fmt: skip
    """Query all predictors of a hook point, and issue the prefetches that are worth it.

    `step` is the step that the candidates are of; `first_begins_at` is when the link can begin,
    `ready_at` when the layer is done, and `layer_experts_s` what the experts of a layer take. The
    arrays are those that `run_clock` takes.
    """
    n_predicting = 0
    for j in range(len(hook_points)):
        n_predicting += hook_points[j] == hook_point and layer + distances[j] < n_layers
    if n_predicting > 0:
        clock[NOW] += pace[PREDICT_OVERHEAD_S] + (
            pace[PREDICT_OUTPUT_OVERHEAD_S] if hook_point == LAYER_OUTPUT else 0.0
        )
        clock[NOW] += n_predicting * pace[PREDICT_S]
    for j in range(len(hook_points)):
        target = layer + distances[j]
        speaks = hook_points[j] == hook_point and target < n_layers
        if speaks and _is_open(j, step, target, absent, entries):
            distance = max(1, distances[j])
            needed_at_s = needed_at(ready_at, distance, pace[DENSE_LAYER_S], layer_experts_s)
            _issue_prefetches(
                j, step, target, first_begins_at, needed_at_s,
                predicted, probability, absent, clock, rest, chunk, entries,
            )  # fmt: skip


@called
def _issue_prefetches(
    j, step, target, first_begins_at, needed_at_s,
    predicted, probability, absent, clock, rest, chunk, entries,
):  # fmt: skip
    """Issue the prefetches of a predictor that are worth it, instead of earlier ones not begun."""
    n_candidates, p = predicted.shape[3], step if probability.shape[1] > 1 else 0
    for entry in range(len(entries)):
        if entries[entry, LAYER] == target and entries[entry, BEGUN] == 0:
            is_candidate = False
            for c in range(n_candidates):
                is_candidate |= predicted[j, step, target, c] == entries[entry, MEMBER]
            if not is_candidate:
                entries[entry, LAYER] = -1
    for c in range(n_candidates):
        expert = predicted[j, step, target, c]
        is_absent = expert >= 0 and absent[j, step, target, c]
        if not is_absent or entry_with(entries, target, expert) >= 0:
            continue
        starts_at, at = first_begins_at, -1
        for entry in range(len(entries) - 1, -1, -1):
            if entries[entry, LAYER] < 0:
                at = entry
        if at < 0:
            break
        for entry in range(len(entries)):
            if 0 <= entries[entry, LAYER] <= target:
                layer, other = int(entries[entry, LAYER]), int(entries[entry, MEMBER])
                starts_at += rest[layer, other, int(entries[entry, BEGUN]), SECONDS]
        load_s, chunk_s = rest[target, expert, 0, SECONDS], chunk[target, expert, 0, SECONDS]
        chance = probability[j, p, target, c]
        if expected_gain_s(chance, starts_at, needed_at_s, load_s, chunk_s) > 0:
            entries[at, LAYER], entries[at, MEMBER], entries[at, BEGUN] = target, expert, 0
            entries[at, ISSUED_AT], entries[at, ORDER] = clock[NOW], clock[N_ISSUED]
            clock[N_ISSUED] += 1


@inlined
def resolve(entries, layer, members, outcomes, first, end, entry_of):
    """Tell which missing members first..end-1 were begun ahead; give up the layer's other entries.

    Fills `entry_of`, from its start, with the member's entry or -1; returns how many entries were
    begun for nothing.
    """
    n_wasted = 0
    for i in range(end - first):
        is_missing = outcomes[layer, first + i] != HIT
        entry_of[i] = entry_with(entries, layer, members[layer, first + i]) if is_missing else -1
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
