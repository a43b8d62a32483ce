"""The clock of a replay, compiled. Import it only where it runs, since that imports numba.

One link serves demands first, and prefetches chunk by chunk while none waits. The engine on a
virtual clock does the same sums in the same order, so that both agree to the last bit.
"""

from __future__ import annotations

from adapmoe_lab.policies.allocation.slots import N_STAGING
from adapmoe_lab.records.step_costs import N_CHUNKS
from adapmoe_lab.simulation.compiled import compiled, inlined
from adapmoe_lab.simulation.replay.outcomes import HIT, LOAD, STREAM
from adapmoe_lab.simulation.timing.clock_arrays import (
    ARRIVAL,
    BEGUN,
    BYTES,
    ISSUED_AT,
    LAYER,
    LINK_FREE,
    LINK_S,
    MEMBER,
    N_BYTES,
    N_LOGGED,
    NOW,
    SECONDS,
)
from adapmoe_lab.simulation.timing.events import AHEAD, DEMAND, DENSE, EXPERT
from adapmoe_lab.simulation.timing.prefetch_buffer import (
    EXPERTS_INPUT,
    LAST_HIDDEN,
    LAYER_OUTPUT,
    TOKEN,
    begins_at,
    next_in_line,
    query_predictors,
    resolve,
)


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
def _demand(clock, log, costs, loads, layer, expert, n_begun):
    """Demand what is left of an expert after so many chunks; return when it arrives."""
    begins = max(clock[NOW], clock[LINK_FREE])
    clock[LINK_FREE] = begins + loads.remaining[layer, expert, n_begun, SECONDS]
    clock[LINK_S] += loads.remaining[layer, expert, n_begun, SECONDS]
    clock[N_BYTES] += loads.remaining[layer, expert, n_begun, BYTES]
    _log(log, clock, DEMAND, layer, expert, begins, clock[LINK_FREE])
    clock[NOW] += costs.miss_s
    return clock[LINK_FREE]


@inlined
def _begin_chunks(clock, log, costs, loads, entries):
    """Begin every chunk whose time came while the link was idle."""
    at, spent_s = next_in_line(entries), 0.0
    while at >= 0:
        begins = max(clock[LINK_FREE], entries[at, ISSUED_AT])
        if begins >= clock[NOW]:
            break
        layer, expert = int(entries[at, LAYER]), int(entries[at, MEMBER])
        n_begun = int(entries[at, BEGUN])
        clock[LINK_FREE] = begins + loads.chunk[layer, expert, n_begun, SECONDS]
        clock[LINK_S] += loads.chunk[layer, expert, n_begun, SECONDS]
        clock[N_BYTES] += loads.chunk[layer, expert, n_begun, BYTES]
        _log(log, clock, AHEAD, layer, expert, begins, clock[LINK_FREE])
        entries[at, ARRIVAL] = clock[LINK_FREE]
        entries[at, BEGUN] += 1
        spent_s += costs.chunk_s
        at = next_in_line(entries)
    clock[NOW] += spent_s


@inlined
def _demand_missing(log, costs, loads, layer, sets, first, end, state):
    """Demand all of a layer's members that are missing, as far as there is staging.

    Fills `arrives` as `entry_of` is filled. Returns when the link will be done with all of it, and
    how many members are missing.
    """
    clock, entries, entry_of, arrives = state
    n_missing, n_streamed, late_s = 0, 0, 0.0
    for i in range(end - first):
        n_missing += sets.outcomes[layer, first + i] != HIT
        entry, expert = entry_of[i], sets.members[layer, first + i]
        if entry >= 0:
            if entries[entry, BEGUN] < N_CHUNKS:
                n_begun = int(entries[entry, BEGUN])
                entries[entry, ARRIVAL] = _demand(clock, log, costs, loads, layer, expert, n_begun)
                entries[entry, BEGUN] = N_CHUNKS
            arrives[i] = entries[entry, ARRIVAL]
    for outcome in (LOAD, STREAM):
        for i in range(end - first if n_missing > 0 else 0):
            if sets.outcomes[layer, first + i] == outcome and entry_of[i] < 0:
                expert = sets.members[layer, first + i]
                n_streamed += outcome == STREAM
                if n_streamed <= N_STAGING:
                    arrives[i] = _demand(clock, log, costs, loads, layer, expert, 0)
                else:
                    late_s += loads.remaining[layer, expert, 0, SECONDS]
    return clock[LINK_FREE] + late_s, n_missing


@inlined
def _run_on_arrival(clock, log, expert_s, layer, expert, arrival):
    """Wait for an expert and compute it; return the seconds waited."""
    waited = max(0.0, arrival - clock[NOW])
    clock[NOW] = max(clock[NOW], arrival)
    _compute(clock, log, EXPERT, layer, expert, expert_s[layer, expert])
    return waited


@inlined
def waiting_adds_s(costs, stall):
    """Return what having waited for `stall` seconds adds to a layer; see `HostCosts.wait_s`."""
    return max(max(costs.wait_s, -costs.dense_layer_s), -stall) if stall > 0 else 0.0


@inlined
def _run_experts(log, costs, expert_s, loads, layer, sets, first, end, n_missing, state):
    """Compute a layer's experts as they arrive; return the seconds waited."""
    clock, entries, entry_of, arrives = state
    stall = 0.0
    for i in range(end - first):
        if sets.outcomes[layer, first + i] == HIT:
            expert = sets.members[layer, first + i]
            _compute(clock, log, EXPERT, layer, expert, expert_s[layer, expert])
    if n_missing == 0:
        return stall
    for i in range(end - first):
        if entry_of[i] >= 0:
            expert = sets.members[layer, first + i]
            stall += _run_on_arrival(clock, log, expert_s, layer, expert, arrives[i])
            clock[NOW] += costs.miss_s  # it is moved to a slot
    for i in range(end - first):
        if sets.outcomes[layer, first + i] == LOAD and entry_of[i] < 0:
            expert = sets.members[layer, first + i]
            stall += _run_on_arrival(clock, log, expert_s, layer, expert, arrives[i])
    late, n_in_flight = 0, 0
    for i in range(end - first):
        if sets.outcomes[layer, first + i] == STREAM and entry_of[i] < 0:
            expert = sets.members[layer, first + i]
            stall += _run_on_arrival(clock, log, expert_s, layer, expert, arrives[i])
            n_in_flight = 0
            late = i + 1
            while late < end - first and n_in_flight < N_STAGING:
                n_in_flight += sets.outcomes[layer, first + late] == STREAM and entry_of[late] < 0
                late += 1
            if n_in_flight == N_STAGING:
                _begin_chunks(clock, log, costs, loads, entries)
                expert = sets.members[layer, first + late - 1]
                arrives[late - 1] = _demand(clock, log, costs, loads, layer, expert, 0)
    for i in range(end - first):
        if entry_of[i] >= 0:
            entries[entry_of[i], LAYER] = -1
    clock[NOW] += waiting_adds_s(costs, stall)
    return stall


@inlined
def _run_layer(step, layer, sets, predictions, costs, expert_s, loads, state, accounts, log):
    """Run one layer: what comes before its experts, demands, prefetches, and the experts."""
    clock, entries, entry_of, _ = state
    _compute(clock, log, DENSE, layer, -1, costs.dense_layer_s)
    _begin_chunks(clock, log, costs, loads, entries)
    first, end = sets.starts[layer, step], sets.starts[layer, step + 1]
    accounts.wasted[step, layer] = resolve(entries, layer, sets, first, end, entry_of)
    hits_s, missing_s, last_s = 0.0, 0.0, 0.0
    for i in range(end - first):
        accounts.used[step, layer] += entry_of[i] >= 0
        own_s = expert_s[layer, sets.members[layer, first + i]]
        if sets.outcomes[layer, first + i] == HIT:
            hits_s += own_s
        else:
            missing_s += own_s
            last_s = max(last_s, own_s)
    link_ready, n_missing = _demand_missing(log, costs, loads, layer, sets, first, end, state)
    layer_ready = max(clock[NOW] + hits_s, link_ready) + last_s
    query_predictors(
        EXPERTS_INPUT, layer, step, max(clock[NOW], link_ready), layer_ready, hits_s + missing_s,
        predictions, clock, costs, loads, entries,
    )  # fmt: skip
    accounts.stall_s[step, layer] = _run_experts(
        log, costs, expert_s, loads, layer, sets, first, end, n_missing, state
    )


@compiled
def run_clock(sets, predictions, costs, expert_s, loads, state, accounts, log):
    """Run the clock over every step, and return how many events were written down.

    Args:
        sets: `ExpertSets`.
        predictions: `Predictions`.
        costs: `HostCosts`.
        expert_s: float64 [L, E], seconds of each resident expert.
        loads: `Loads`.
        state: `ClockState`, as `empty_clock` returns it.
        accounts: `Accounts`, filled in.
        log: float64 [M, 5], filled with the first events: kind, layer, expert, begin, end.
    """
    clock, entries, _, _ = state
    n_layers, n_steps = sets.starts.shape[0], sets.starts.shape[1] - 1
    predicts_at_output = False
    for j in range(len(predictions.hook_points)):
        predicts_at_output |= predictions.hook_points[j] == LAYER_OUTPUT
    for step in range(n_steps):
        query_predictors(
            TOKEN, 0, step, begins_at(clock), clock[NOW], 0.0,
            predictions, clock, costs, loads, entries,
        )  # fmt: skip
        for layer in range(n_layers):
            _run_layer(step, layer, sets, predictions, costs, expert_s, loads, state, accounts, log)
            if predicts_at_output:
                query_predictors(
                    LAYER_OUTPUT, layer, step, begins_at(clock), clock[NOW], 0.0,
                    predictions, clock, costs, loads, entries,
                )  # fmt: skip
        if step + 1 < n_steps:
            query_predictors(
                LAST_HIDDEN, 0, step + 1, begins_at(clock), clock[NOW] + costs.head_s, 0.0,
                predictions, clock, costs, loads, entries,
            )  # fmt: skip
        _compute(clock, log, DENSE, -1, -1, costs.head_s)
        accounts.n_bytes[step] = int(clock[N_BYTES])
        accounts.link_s[step] = clock[LINK_S]
        clock[N_BYTES] = clock[LINK_S] = 0
        accounts.ended_s[step] = clock[NOW]
    return int(clock[N_LOGGED])
