"""The clock of a replay, compiled. Import it only where it runs, since that imports numba.

One link serves demands first and fetches ahead, chunk by chunk, while none waits. The engine on a
virtual clock does the same sums in the same order, so that both agree to the last bit.
"""

from __future__ import annotations

import numpy as np

from adapmoe_lab.policies.allocation.slots import N_STAGING
from adapmoe_lab.policies.prefetch.expected_gain import N_CHUNKS
from adapmoe_lab.simulation.compiled import compiled, inlined
from adapmoe_lab.simulation.replay.outcomes import HIT, LOAD, STREAM
from adapmoe_lab.simulation.timing.buffer_loops import (
    ARRIVAL,
    BEGUN,
    BYTES,
    CHUNK_S,
    DENSE_LAYER_S,
    EXPERTS_INPUT,
    HEAD_S,
    ISSUED_AT,
    LAST_HIDDEN,
    LAYER,
    LAYER_OUTPUT,
    LINK_FREE,
    LINK_S,
    MEMBER,
    MISS_S,
    N_BYTES,
    N_LOGGED,
    NOW,
    SECONDS,
    TOKEN,
    WAIT_S,
    begins_at,
    next_in_line,
    query_predictors,
    resolve,
)
from adapmoe_lab.simulation.timing.timeline import EVENT_KINDS

DENSE, EXPERT, DEMAND, AHEAD = range(len(EVENT_KINDS))
"""Kinds of events: computing beside the experts; one expert computed; an expert brought when it was
needed, or the rest of one that was begun ahead; a chunk of one fetched ahead."""


@inlined
def _log(log, clock, kind, layer, expert, begin, end):
    """Write an event into the next entry of `log` [M, 5], if there is one."""
    if len(log) > 0 and clock[N_LOGGED] < len(log):
        at = int(clock[N_LOGGED])
        log[at, 0], log[at, 1], log[at, 2], log[at, 3], log[at, 4] = kind, layer, expert, begin, end
        clock[N_LOGGED] += 1


@inlined
def _compute(clock, log, kind, layer, expert, seconds):
    _log(log, clock, kind, layer, expert, clock[NOW], clock[NOW] + seconds)
    clock[NOW] += seconds


@inlined
def _copy(clock, log, pace, rest, layer, expert, n_begun):
    """Bring what is left of an expert after so many chunks; return when it is there."""
    begins = max(clock[NOW], clock[LINK_FREE])
    clock[LINK_FREE] = begins + rest[layer, expert, n_begun, SECONDS]
    clock[LINK_S] += rest[layer, expert, n_begun, SECONDS]
    clock[N_BYTES] += rest[layer, expert, n_begun, BYTES]
    _log(log, clock, DEMAND, layer, expert, begins, clock[LINK_FREE])
    clock[NOW] += pace[MISS_S]
    return clock[LINK_FREE]


@inlined
def _begin_chunks(clock, log, pace, entries, chunk):
    """Begin every chunk whose time came while the link was idle."""
    at, spent_s = next_in_line(entries), 0.0
    while at >= 0:
        begins = max(clock[LINK_FREE], entries[at, ISSUED_AT])
        if begins >= clock[NOW]:
            break
        layer, expert, n_begun = (
            int(entries[at, LAYER]),
            int(entries[at, MEMBER]),
            int(entries[at, BEGUN]),
        )
        clock[LINK_FREE] = begins + chunk[layer, expert, n_begun, SECONDS]
        clock[LINK_S] += chunk[layer, expert, n_begun, SECONDS]
        clock[N_BYTES] += chunk[layer, expert, n_begun, BYTES]
        _log(log, clock, AHEAD, layer, expert, begins, clock[LINK_FREE])
        entries[at, ARRIVAL] = clock[LINK_FREE]
        entries[at, BEGUN] += 1
        spent_s += pace[CHUNK_S]
        at = next_in_line(entries)
    clock[NOW] += spent_s


@inlined
def _demand(
    clock, log, pace, rest, layer, members, outcomes, first, end, entries, entry_of, arrives
):
    """Ask for all of a layer's members that is missing, as far as there is staging.

    Fills `arrives` as `entry_of` is filled. Returns when the link will be done with all of it, and
    how many members are missing.
    """
    n_missing, n_streamed, late_s = 0, 0, 0.0
    for i in range(end - first):
        n_missing += outcomes[layer, first + i] != HIT
        entry, expert = entry_of[i], members[layer, first + i]
        if entry >= 0:
            if entries[entry, BEGUN] < N_CHUNKS:
                n_begun = int(entries[entry, BEGUN])
                entries[entry, ARRIVAL] = _copy(clock, log, pace, rest, layer, expert, n_begun)
                entries[entry, BEGUN] = N_CHUNKS
            arrives[i] = entries[entry, ARRIVAL]
    for outcome in (LOAD, STREAM):
        for i in range(end - first if n_missing > 0 else 0):
            if outcomes[layer, first + i] == outcome and entry_of[i] < 0:
                expert = members[layer, first + i]
                n_streamed += outcome == STREAM
                if n_streamed <= N_STAGING:
                    arrives[i] = _copy(clock, log, pace, rest, layer, expert, 0)
                else:
                    late_s += rest[layer, expert, 0, SECONDS]
    return clock[LINK_FREE] + late_s, n_missing


@inlined
def _run_when_there(clock, log, expert_s, layer, expert, arrival):
    """Wait for an expert and compute it; return the seconds waited."""
    waited = max(0.0, arrival - clock[NOW])
    clock[NOW] = max(clock[NOW], arrival)
    _compute(clock, log, EXPERT, layer, expert, expert_s[layer, expert])
    return waited


@inlined
def _run_experts(
    clock, log, pace, expert_s, rest, chunk, entries, layer, members, outcomes, first, end,
    entry_of,
    arrives, n_missing,
):  # fmt: skip
    """Compute a layer's experts as they are there; return the seconds waited."""
    stall = 0.0
    for i in range(end - first):
        if outcomes[layer, first + i] == HIT:
            expert = members[layer, first + i]
            _compute(clock, log, EXPERT, layer, expert, expert_s[layer, expert])
    if n_missing == 0:
        return stall
    for i in range(end - first):
        if entry_of[i] >= 0:
            expert = members[layer, first + i]
            stall += _run_when_there(clock, log, expert_s, layer, expert, arrives[i])
            clock[NOW] += pace[MISS_S]  # it is moved to a slot
    for i in range(end - first):
        if outcomes[layer, first + i] == LOAD and entry_of[i] < 0:
            expert = members[layer, first + i]
            stall += _run_when_there(clock, log, expert_s, layer, expert, arrives[i])
    late, n_in_flight = 0, 0
    for i in range(end - first):
        if outcomes[layer, first + i] == STREAM and entry_of[i] < 0:
            expert = members[layer, first + i]
            stall += _run_when_there(clock, log, expert_s, layer, expert, arrives[i])
            n_in_flight = 0
            late = i + 1
            while late < end - first and n_in_flight < N_STAGING:
                n_in_flight += outcomes[layer, first + late] == STREAM and entry_of[late] < 0
                late += 1
            if n_in_flight == N_STAGING:
                _begin_chunks(clock, log, pace, entries, chunk)
                expert = members[layer, first + late - 1]
                arrives[late - 1] = _copy(clock, log, pace, rest, layer, expert, 0)
    for i in range(end - first):
        if entry_of[i] >= 0:
            entries[entry_of[i], LAYER] = -1
    clock[NOW] += max(pace[WAIT_S], -stall) if stall > 0 else 0.0
    return stall


@compiled
def run_clock(
    members, starts, outcomes, hook_points, distances, predicted, probability, absent,
    pace, expert_s, rest, chunk, state, used, wasted, stall, n_bytes, link_s, ended, log,
):  # fmt: skip
    """Run the clock over every step, and return how many events were written down.

    Args:
        members: int16 [L, T K], the sets of each layer, as `collect_sets` gives them.
        starts: int32 [L, N+1], where each set begins.
        outcomes: int8 [L, T K], what becomes of each member.
        hook_points: int64 [J], when each predictor speaks.
        distances: int64 [J], of which layer, counted from its own.
        predicted: int16 [J, N, L, C], experts that will be needed, -1 for none.
        probability: float64 [J, N or 1, L, C], that they will.
        absent: bool [J, N, L, C], which were not resident when they were predicted.
        pace: float64 [8], seconds of everything but the link and the experts.
        expert_s: float64 [L, E], seconds of each expert that is there.
        rest: float64 [L, E, P+1, 2], seconds and bytes of what is left of an expert when so many
            chunks are begun.
        chunk: float64 [L, E, P, 2], seconds and bytes of each chunk.
        state: what `empty_clock` returns.
        used: int16 [N, L], filled with the experts that were begun ahead and needed.
        wasted: int16 [N, L], filled with those that were begun and not needed.
        stall: float64 [N, L], filled with the seconds that computing waited.
        n_bytes: int64 [N], filled with the bytes that crossed.
        link_s: float64 [N], filled with the seconds that took.
        ended: float64 [N], filled with when each step ended.
        log: float64 [M, 5], filled with the first events: kind, layer, expert, begin, end.
    """
    n_layers, n_steps = starts.shape[0], starts.shape[1] - 1
    dense_layer_s, head_s = pace[DENSE_LAYER_S], pace[HEAD_S]
    clock, entries, entry_of, arrives = state
    predicts_at_output = False
    for j in range(len(hook_points)):
        predicts_at_output |= hook_points[j] == LAYER_OUTPUT
    for step in range(n_steps):
        query_predictors(
            TOKEN, 0, step, begins_at(clock), clock[NOW], 0.0, n_layers,
            hook_points, distances, predicted, probability, absent, clock, pace, rest, chunk,
 entries,
        )  # fmt: skip
        for layer in range(n_layers):
            _compute(clock, log, DENSE, layer, -1, dense_layer_s)
            _begin_chunks(clock, log, pace, entries, chunk)
            first, end = starts[layer, step], starts[layer, step + 1]
            wasted[step, layer] = resolve(entries, layer, members, outcomes, first, end, entry_of)
            hits_s, missing_s, last_s = 0.0, 0.0, 0.0
            for i in range(end - first):
                used[step, layer] += entry_of[i] >= 0
                own_s = expert_s[layer, members[layer, first + i]]
                if outcomes[layer, first + i] == HIT:
                    hits_s += own_s
                else:
                    missing_s += own_s
                    last_s = max(last_s, own_s)
            link_ready, n_missing = _demand(
                clock,
                log,
                pace,
                rest,
                layer,
                members,
                outcomes,
                first,
                end,
                entries,
                entry_of,
                arrives,
            )
            ready_at = max(clock[NOW] + hits_s, link_ready) + last_s
            query_predictors(
                EXPERTS_INPUT, layer, step, max(clock[NOW], link_ready), ready_at,
                hits_s + missing_s, n_layers,
                hook_points, distances, predicted, probability, absent, clock, pace, rest, chunk,
 entries,
            )  # fmt: skip
            stall[step, layer] = _run_experts(
                clock, log, pace, expert_s, rest, chunk, entries, layer, members, outcomes, first,
 end, entry_of, arrives, n_missing,
            )  # fmt: skip
            if predicts_at_output:
                query_predictors(
                    LAYER_OUTPUT, layer, step, begins_at(clock), clock[NOW], 0.0, n_layers,
                    hook_points, distances, predicted, probability, absent, clock, pace, rest,
 chunk, entries,
                )  # fmt: skip
        if step + 1 < n_steps:
            query_predictors(
                LAST_HIDDEN, 0, step + 1, begins_at(clock), clock[NOW] + head_s, 0.0, n_layers,
                hook_points, distances, predicted, probability, absent, clock, pace, rest, chunk,
 entries,
            )  # fmt: skip
        _compute(clock, log, DENSE, -1, -1, head_s)
        n_bytes[step] = int(clock[N_BYTES])
        link_s[step] = clock[LINK_S]
        clock[N_BYTES] = clock[LINK_S] = 0
        ended[step] = clock[NOW]
    return int(clock[N_LOGGED])


@compiled
def time_layer(
    members, starts, outcomes, load, expert_s, pace, missing, arrives, stall, spent, n_bytes, link_s
):  # fmt: skip
    """Time every step of one layer that finds and leaves the link idle, as `run_clock` does.

    The inner loop is one function on purpose: it runs a million times for a slider.

    Args:
        members: int16 [T K], the sets of the layer.
        starts: int32 [N+1], where each set begins.
        outcomes: int8 [T K], what becomes of each member.
        load: float64 [E, 2], seconds and bytes of each expert.
        expert_s: float64 [E], seconds of each that is there.
        pace: as `run_clock` takes it.
        missing: int64, room for the experts that the max_set_size step may miss.
        arrives: float64, as much room.
        stall: float64 [N], filled with the seconds that computing waited.
        spent: float64 [N], filled with the seconds of the layer.
        n_bytes: int64 [N], filled with the bytes that crossed.
        link_s: float64 [N], filled with the seconds that took.
    """
    miss_s = pace[MISS_S]
    for step in range(len(starts) - 1):
        now, link_free, waited, crossed, busy = pace[DENSE_LAYER_S], 0.0, 0.0, 0.0, 0.0
        hits_s, n_loads, n_missing = 0.0, 0, 0
        for i in range(starts[step], starts[step + 1]):
            if outcomes[i] == LOAD:
                missing[n_loads] = members[i]
                n_loads += 1
            elif outcomes[i] == HIT:
                hits_s += expert_s[members[i]]
        n_missing = n_loads
        for i in range(starts[step], starts[step + 1]):
            if outcomes[i] == STREAM:
                missing[n_missing] = members[i]
                n_missing += 1
        n_asked = min(n_missing, n_loads + N_STAGING)
        for n in range(n_asked):
            link_free = max(now, link_free) + load[missing[n], SECONDS]
            arrives[n] = link_free
            now += miss_s
        now += hits_s
        for n in range(n_missing):
            busy += load[missing[n], SECONDS]
            crossed += load[missing[n], BYTES]
            waited += max(0.0, arrives[n] - now)
            now = max(now, arrives[n]) + expert_s[missing[n]]
            if n >= n_loads and n_asked < n_missing:
                link_free = max(now, link_free) + load[missing[n_asked], SECONDS]
                arrives[n_asked] = link_free
                now += miss_s
                n_asked += 1
        stall[step] = waited
        spent[step] = now + (max(pace[WAIT_S], -waited) if waited > 0 else 0.0)
        n_bytes[step], link_s[step] = int(crossed), busy


def empty_clock(n_entries: int, max_set_size: int) -> tuple[np.ndarray, ...]:
    """Return what the clock keeps, at zero and with an empty buffer of so many entries.

    In order: its own state; the buffer; the entry and the arrival of every member of the
    max_set_size step.
    """
    entries = np.zeros((n_entries, 6))
    entries[:, LAYER] = -1
    return np.zeros(6), entries, np.full(max_set_size, -1), np.zeros(max_set_size)
