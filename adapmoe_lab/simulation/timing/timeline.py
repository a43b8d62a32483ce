"""When everything of a replay happens: computing, demands, and what is fetched ahead meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.prefetch.expected_gain import N_CHUNKS, chunk_bounds
from adapmoe_lab.records import HardwareProfile, PrecisionPlan
from adapmoe_lab.records.prefetch import HookPoint
from adapmoe_lab.simulation.replay.expert_sets import in_threads
from adapmoe_lab.simulation.replay.outcomes import LOAD
from adapmoe_lab.simulation.replay.recorded_candidates import NO_CANDIDATES, Candidates
from adapmoe_lab.simulation.replay.replay import Replay


@dataclass(frozen=True, eq=False)
class StepCosts:
    """What the parts of a forward pass take.

    Attributes:
        dense_layer_s: seconds of a layer before it asks for its experts.
        expert_s: float64 [L, E], seconds of each expert that is there; one number is for all.
        head_s: seconds of what follows the last layer.
        rest: float64 [L, E, P+1, 2], seconds and bytes to bring what is left of an expert when so
            many of its P chunks were begun ahead.
        chunk: float64 [L, E, P, 2], seconds and bytes of each chunk.
        miss_s: seconds that the host takes for each demand, and to move one fetched ahead.
        wait_s: seconds that a layer takes more for having waited. If less, the host works on
            meanwhile: at most what was waited and what the next layer takes before it asks, and
            not at all where somebody is asked about the layer's output, for which the host waits.
        predict_s: seconds that the host takes to ask a predictor about a layer.
        chunk_s: seconds that the host takes for each chunk.
        predict_overhead_s: seconds that a hook_point takes at which any predictor is asked.
        predict_output_overhead_s: seconds that it takes more at a layer's output.
    """

    dense_layer_s: float
    expert_s: NDArray[np.float64]
    head_s: float
    rest: NDArray[np.float64]
    chunk: NDArray[np.float64]
    miss_s: float = 0.0
    wait_s: float = 0.0
    predict_s: float = 0.0
    chunk_s: float = 0.0
    predict_overhead_s: float = 0.0
    predict_output_overhead_s: float = 0.0

    def __post_init__(self) -> None:
        """Give every expert its seconds."""
        expert_s = np.broadcast_to(np.asarray(self.expert_s, np.float64), self.rest.shape[:2])
        object.__setattr__(self, "expert_s", expert_s.copy())

    @property
    def pace(self) -> NDArray[np.float64]:
        """Seconds beside the link and the experts, in the order the compiled clock reads them."""
        return np.array(
            [
                self.dense_layer_s,
                self.head_s,
                self.miss_s,
                max(self.wait_s, -self.dense_layer_s),
                self.predict_s,
                self.chunk_s,
                self.predict_overhead_s,
                self.predict_output_overhead_s,
            ]
        )

    @classmethod
    def of(
        cls,
        expert_bytes: NDArray[np.int64],
        seconds: Callable[[int], float],
        *,
        dense_layer_s: float,
        expert_s: float | NDArray[np.float64],
        head_s: float = 0.0,
    ) -> StepCosts:
        """Return the costs for experts of `expert_bytes` [L, E] over a link.

        Args:
            expert_bytes: stored bytes of every expert.
            seconds: returns what the link takes for a number of bytes.
            dense_layer_s: see the attributes.
            expert_s: see the attributes.
            head_s: see the attributes.
        """
        rest = np.zeros((*expert_bytes.shape, N_CHUNKS + 1, 2))
        chunk = np.zeros((*expert_bytes.shape, N_CHUNKS, 2))
        for size in np.unique(expert_bytes).tolist():
            bounds, own = chunk_bounds(size), expert_bytes == size
            left = [size - begun for begun in bounds]
            parts = np.diff(bounds).tolist()
            rest[own] = [(seconds(n) if n else 0.0, n) for n in left]
            chunk[own] = [(seconds(n), n) for n in parts]
        return cls(dense_layer_s, np.asarray(expert_s), head_s, rest, chunk)

    @classmethod
    def on(
        cls, hardware: HardwareProfile, precision: PrecisionPlan, is_gated: bool = False
    ) -> StepCosts:
        """Return the costs that were measured on a machine; what was not is taken as nothing.

        Args:
            hardware: what was measured.
            precision: how the experts are stored, with their bytes.
            is_gated: whether experts may be skipped.
        """
        expert_bytes = precision.expert_bytes
        if expert_bytes is None:
            raise ValueError(f"Costs need the bytes of every expert; {precision} comes without.")
        gated_predict_s = hardware.gated_predict_s if is_gated else None
        costs = cls.of(
            expert_bytes,
            hardware.load_s,
            dense_layer_s=hardware.dense_layer_s(len(expert_bytes), is_gated),
            expert_s=hardware.expert_times(precision),
        )
        return replace(
            costs,
            miss_s=hardware.miss_s or 0.0,
            wait_s=hardware.wait_s or 0.0,
            predict_s=gated_predict_s or hardware.predict_s or 0.0,
            chunk_s=(hardware.host_copy_s or 0.0) / N_CHUNKS,
            predict_overhead_s=hardware.predict_overhead_s or 0.0,
            predict_output_overhead_s=hardware.predict_output_overhead_s or 0.0,
        )


@dataclass(frozen=True, eq=False)
class Timeline:
    """What happened when, of N steps and L layers.

    Attributes:
        used: int16 [N, L], experts begun ahead that were needed then.
        wasted: int16 [N, L], experts begun ahead that were not.
        stall_s: float64 [N, L], seconds that computing waited for the link.
        n_bytes: int64 [N], bytes that crossed the link.
        link_s: float64 [N], seconds the link was busy with what was begun in each step.
        ended_s: float64 [N], when each step ended; the first began at zero.
        events: float64 [M, 5], the first events in the order they were decided: kind, layer,
            expert, begin and end; kinds are those of `EVENT_KINDS`, -1 stands for no layer or
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


EVENT_KINDS = ("dense", "expert", "demand", "ahead")


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
        costs: what everything takes.
        candidates: who is followed in fetching ahead.
        buffer_slots: experts that can be on their way or waiting at once.
        n_events: how many events to keep.
    """
    if not len(candidates.hook_points) and not n_events:
        return _layer_by_layer(replayed, costs)
    from adapmoe_lab.simulation.timing.clock_loops import empty_clock, run_clock

    if (candidates.hook_points == HookPoint.LAYER_OUTPUT).any():
        costs = replace(costs, wait_s=max(0.0, costs.wait_s))
    shape = replayed.hits.shape
    used, wasted, stall_s = np.zeros(shape, np.int16), np.zeros(shape, np.int16), np.zeros(shape)
    n_bytes, link_s, ended_s = np.zeros(shape[0], np.int64), np.zeros(shape[0]), np.zeros(shape[0])
    events = np.zeros((n_events, 5))
    n_logged = run_clock(
        replayed.members,
        replayed.starts,
        replayed.outcomes,
        candidates.hook_points,
        candidates.distances,
        candidates.experts,
        candidates.probability,
        replayed.absent,
        costs.pace,
        costs.expert_s,
        costs.rest,
        costs.chunk,
        empty_clock(buffer_slots, replayed.max_set_size),
        used,
        wasted,
        stall_s,
        n_bytes,
        link_s,
        ended_s,
        events,
    )
    return Timeline(used, wasted, stall_s, n_bytes, link_s, ended_s, events[:n_logged])


def _layer_by_layer(replayed: Replay, costs: StepCosts) -> Timeline:
    """Time layers by themselves, as many at once as there are cores, and add them up.

    That is the same, since without fetching ahead a layer finds and leaves the link idle.
    """
    from adapmoe_lab.simulation.timing.clock_loops import time_layer

    n_steps, n_layers = replayed.hits.shape
    stall_s, spent_s, link_s = np.zeros((3, n_layers, n_steps))
    n_bytes = np.zeros((n_layers, n_steps), dtype=np.int64)
    loads = np.ascontiguousarray(costs.rest[:, :, 0])

    max_set_size = replayed.max_set_size

    def run(layer: int) -> None:
        out = stall_s[layer], spent_s[layer], n_bytes[layer], link_s[layer]
        own = replayed.members[layer], replayed.starts[layer], replayed.outcomes[layer]
        room = np.empty(max_set_size, dtype=np.int64), np.empty(max_set_size)
        time_layer(*own, loads[layer], costs.expert_s[layer], costs.pace, *room, *out)

    in_threads(run, n_layers)
    nothing = np.zeros((n_steps, n_layers), dtype=np.int16)
    return Timeline(
        used=nothing,
        wasted=nothing,
        stall_s=stall_s.T,
        n_bytes=n_bytes.sum(axis=0),
        link_s=link_s.sum(axis=0),
        ended_s=np.cumsum(spent_s.sum(axis=0) + costs.head_s),
        events=np.zeros((0, 5)),
    )
