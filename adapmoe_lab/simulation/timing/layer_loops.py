"""One layer timed by itself, compiled. Import it only where it runs, since that imports numba."""

from __future__ import annotations

from adapmoe_lab.policies.allocation.slots import N_STAGING
from adapmoe_lab.simulation.compiled import compiled
from adapmoe_lab.simulation.replay.outcomes import HIT, LOAD, STREAM
from adapmoe_lab.simulation.timing.clock_arrays import BYTES, SECONDS
from adapmoe_lab.simulation.timing.clock_loops import waiting_adds_s


@compiled
def time_layer(
    members, starts, outcomes, load, expert_s, costs, missing, arrives,
    stall, spent, n_bytes, link_s,
):  # fmt: skip
    """Time every step of one layer that finds and leaves the link idle, as `run_clock` does.

    The inner loop is one function on purpose: it runs a million times for a slider.

    Args:
        members: int16 [T K], the sets of the layer.
        starts: int32 [N+1], where each set begins.
        outcomes: int8 [T K], what becomes of each member.
        load: float64 [E, 2], seconds and bytes of each expert.
        expert_s: float64 [E], seconds of each that is resident.
        costs: `HostCosts`.
        missing: int64, room for the experts that the largest set may miss.
        arrives: float64, as much room.
        stall: float64 [N], filled with the seconds that computing waited.
        spent: float64 [N], filled with the seconds of the layer.
        n_bytes: int64 [N], filled with the bytes that crossed.
        link_s: float64 [N], filled with the seconds that took.
    """
    miss_s = costs.miss_s
    for step in range(len(starts) - 1):
        now, link_free, waited, crossed, busy = costs.dense_layer_s, 0.0, 0.0, 0.0, 0.0
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
        n_demanded = min(n_missing, n_loads + N_STAGING)
        for n in range(n_demanded):
            link_free = max(now, link_free) + load[missing[n], SECONDS]
            arrives[n] = link_free
            now += miss_s
        now += hits_s
        for n in range(n_missing):
            busy += load[missing[n], SECONDS]
            crossed += load[missing[n], BYTES]
            waited += max(0.0, arrives[n] - now)
            now = max(now, arrives[n]) + expert_s[missing[n]]
            if n >= n_loads and n_demanded < n_missing:
                link_free = max(now, link_free) + load[missing[n_demanded], SECONDS]
                arrives[n_demanded] = link_free
                now += miss_s
                n_demanded += 1
        stall[step] = waited
        spent[step] = now + waiting_adds_s(costs, waited)
        n_bytes[step], link_s[step] = int(crossed), busy
