"""When everything of a replay happens: computing, demands, and the prefetches meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.step_costs import StepCosts
from adapmoe_lab.simulation.replay.expert_sets import in_threads
from adapmoe_lab.simulation.replay.outcomes import LOAD
from adapmoe_lab.simulation.replay.recorded_candidates import NO_CANDIDATES, Candidates
from adapmoe_lab.simulation.replay.replay import Replay
from adapmoe_lab.simulation.timing.clock_arrays import (
    ExpertSets,
    Loads,
    Predictions,
    empty_accounts,
    empty_clock,
)


@dataclass(frozen=True, eq=False)
class Timeline:
    """What happened when, of N steps and L layers.

    Attributes:
        used: int16 [N, L], prefetches begun whose experts were needed.
        wasted: int16 [N, L], prefetches begun whose experts were not.
        stall_s: float64 [N, L], seconds that computing waited for the link.
        n_bytes: int64 [N], bytes that crossed the link.
        link_s: float64 [N], seconds the link was busy with what was begun in each step.
        ended_s: float64 [N], when each step ended; the first began at zero.
        events: float64 [M, 5], the first events in the order they were decided: kind, layer,
            expert, begin and end; kinds are places in `EVENT_KINDS`, -1 stands for no layer or
            expert.
    """

    used: NDArray[np.int16]
    wasted: NDArray[np.int16]
    stall_s: NDArray[np.float64]
    n_bytes: NDArray[np.int64]
    link_s: NDArray[np.float64]
    ended_s: NDArray[np.float64]
    events: NDArray[np.float64]

    @property
    def step_s(self) -> NDArray[np.float64]:
        """Seconds of every step, [N]."""
        return np.diff(self.ended_s, prepend=0.0)


def counted_replay(hits: NDArray[np.integer], loads: NDArray[np.integer]) -> Replay:
    """Return a replay of steps [N, L] of which only counts are known; which experts is made up."""
    hits, loads = hits.astype(np.int16), loads.astype(np.int16)
    n_steps, n_layers = hits.shape
    width = int((hits + loads).sum(axis=0).max())
    members = np.zeros((n_layers, width), dtype=np.int16)
    outcomes = np.zeros((n_layers, width), dtype=np.int8)
    starts = np.zeros((n_layers, n_steps + 1), dtype=np.int32)
    starts[:, 1:] = (hits + loads).cumsum(axis=0).T
    for step, layer in np.ndindex(n_steps, n_layers):
        first, end = starts[layer, step : step + 2]
        members[layer, first:end] = np.arange(end - first)
        outcomes[layer, first + hits[step, layer] : end] = LOAD
    is_decode, absent = np.ones(n_steps, dtype=np.bool_), np.zeros((0, 0, 0, 0), dtype=np.bool_)
    return Replay(hits, loads, np.zeros_like(hits), is_decode, members, starts, outcomes, absent)


def run_timeline(
    replayed: Replay,
    costs: StepCosts,
    candidates: Candidates = NO_CANDIDATES,
    buffer_slots: int = 0,
    n_events: int = 0,
) -> Timeline:
    """Run the clock over a replay.

    Args:
        replayed: what is needed and resident, replayed with the same candidates.
        costs: what everything takes, with the bytes of every expert.
        candidates: what is predicted, and may be prefetched.
        buffer_slots: experts that can be on their way or waiting at once.
        n_events: how many events to keep.
    """
    if not len(candidates.hook_points) and not n_events:
        return _layer_by_layer(replayed, costs)
    from adapmoe_lab.simulation.timing.clock_loops import run_clock

    host = costs.host
    if (candidates.hook_points == HookPoint.LAYER_OUTPUT).any():
        host = host._replace(wait_s=max(0.0, host.wait_s))
    predictions = Predictions(
        candidates.hook_points,
        candidates.distances,
        candidates.experts,
        candidates.probability,
        replayed.absent,
    )
    accounts, events = empty_accounts(*replayed.hits.shape), np.zeros((n_events, 5))
    n_logged = run_clock(
        ExpertSets(replayed.members, replayed.starts, replayed.outcomes),
        predictions,
        host,
        costs.expert_s,
        Loads(costs.remaining_loads, costs.chunk_loads),
        empty_clock(buffer_slots, replayed.max_set_size),
        accounts,
        events,
    )
    return Timeline(*accounts, events[:n_logged])


def _layer_by_layer(replayed: Replay, costs: StepCosts) -> Timeline:
    """Time layers by themselves, as many at once as there are cores, and add them up.

    That is the same, since without prefetch a layer finds and leaves the link idle.
    """
    from adapmoe_lab.simulation.timing.layer_loops import time_layer

    n_steps, n_layers = replayed.hits.shape
    stall_s, spent_s, link_s = np.zeros((3, n_layers, n_steps))
    n_bytes = np.zeros((n_layers, n_steps), dtype=np.int64)
    loads = np.ascontiguousarray(costs.remaining_loads[:, :, 0])
    max_set_size = replayed.max_set_size

    def run(layer: int) -> None:
        out = stall_s[layer], spent_s[layer], n_bytes[layer], link_s[layer]
        own = replayed.members[layer], replayed.starts[layer], replayed.outcomes[layer]
        room = np.empty(max_set_size, dtype=np.int64), np.empty(max_set_size)
        time_layer(*own, loads[layer], costs.expert_s[layer], costs.host, *room, *out)

    in_threads(run, n_layers)
    nothing = np.zeros((n_steps, n_layers), dtype=np.int16)
    return Timeline(
        used=nothing,
        wasted=nothing,
        stall_s=stall_s.T,
        n_bytes=n_bytes.sum(axis=0),
        link_s=link_s.sum(axis=0),
        ended_s=np.cumsum(spent_s.sum(axis=0) + costs.host.head_s),
        events=np.zeros((0, 5)),
    )
