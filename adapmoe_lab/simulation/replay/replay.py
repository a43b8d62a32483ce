"""Replay of a recorded trace through gating and cache, by the step rules."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.eviction.rules import BELADY, FIXED_SCORES, HOBBIT, POLICIES
from adapmoe_lab.records import CachePlan, RoutingTrace
from adapmoe_lab.simulation.replay.recorded_candidates import NO_CANDIDATES, Candidates, step_bounds

HIT, LOAD, STREAM = range(3)
"""What becomes of a member of a step's set: it was resident, gets a slot, or passes through."""


@dataclass(frozen=True, eq=False)
class Replay:
    """What became of the experts that every step and layer needed.

    Attributes:
        hits: int16 [N, L], distinct experts resident before the step; N steps.
        loads: int16 [N, L], distinct experts brought into a slot.
        streamed: int16 [N, L], distinct experts that only passed through staging.
        is_decode: bool [N], which steps were decode.
        members: int16 [L, T K], the distinct experts of each layer's steps one after another.
        starts: int32 [L, N+1], where the experts of each step begin, and the last ones end.
        outcomes: int8 [L, T K], what became of each: `HIT`, `LOAD` or `STREAM`.
        absent: bool [J, N, L, C], which candidates spoke of experts that were not resident then.
    """

    hits: NDArray[np.int16]
    loads: NDArray[np.int16]
    streamed: NDArray[np.int16]
    is_decode: NDArray[np.bool_]
    members: NDArray[np.int16]
    starts: NDArray[np.int32]
    outcomes: NDArray[np.int8]
    absent: NDArray[np.bool_]

    @property
    def misses(self) -> NDArray[np.int16]:
        """Distinct experts that crossed the link, int16 [N, L]."""
        return self.loads + self.streamed

    @property
    def max_set_size(self) -> int:
        """The most experts that a layer needed in one step."""
        return int(np.diff(self.starts).max())


def replay(
    trace: RoutingTrace,
    keep: NDArray[np.bool_],
    plan: CachePlan | None,
    eviction: str = "lru",
    candidates: Candidates = NO_CANDIDATES,
) -> Replay:
    """Replay a trace whose experts `keep` [T, L, K] are run; the cache starts empty.

    Without a plan every layer has room for all its experts. The first call of a process takes
    half a second more, the first on a machine some seconds: the loops are compiled then.

    Args:
        trace: recorded routing; tokens that share a step are run together.
        keep: which of the routed experts are run.
        plan: slots per layer, or shared by all.
        eviction: name of a policy, those that need the future included.
        candidates: of experts to come, whose residency is wanted. Fetching ahead leaves the cache
            as it is without.

    Raises:
        ValueError: there is no such policy.
    """
    if eviction not in POLICIES:
        raise ValueError(
            f"eviction={eviction!r} is unknown; expected one of {', '.join(POLICIES)}."
        )
    from adapmoe_lab.simulation.replay.pool_loops import empty_pool, replay_pool

    policy, spec = POLICIES[eviction], trace.spec
    plan = plan if plan is not None else slots_plan(spec, spec.n_experts)
    pinned = plan.pinned_mask(spec.n_experts) & policy.pins
    bounds = step_bounds(trace)
    n_shared = spec.n_layers // plan.n_pools  # layers per pool
    members, starts = expert_sets(trace, keep, bounds)
    oracle_inputs = _oracle_inputs(trace, policy.rule, members, starts, bounds, n_shared)
    bits = trace.router_probs.view(np.uint16)
    counts = np.empty((plan.n_pools, len(bounds) - 1, n_shared, 3), dtype=np.int16)
    outcomes = np.empty(members.shape, dtype=np.int8)
    absent = np.zeros(candidates.experts.shape, dtype=np.bool_)

    def replay_one(pool: int) -> None:
        first = pool * n_shared
        own = slice(first, first + n_shared)
        replay_pool(
            policy.rule,
            plan.pool_slots(pool),
            first,
            members[own],
            starts[own],
            oracle_inputs[own],
            bits,
            FIXED_SCORES,
            bounds,
            pinned[own],
            empty_pool(n_shared, spec.n_experts),
            counts[pool],
            outcomes[own],
            candidates.distances,
            candidates.experts,
            absent,
        )

    in_threads(replay_one, plan.n_pools)
    hits, loads, streamed = counts.transpose(3, 1, 0, 2).reshape(3, -1, spec.n_layers)
    is_decode = trace.is_decode[bounds[:-1]]
    return Replay(hits, loads, streamed, is_decode, members, starts, outcomes, absent)


def expert_sets(
    trace: RoutingTrace, keep: NDArray[np.bool_], bounds: NDArray[np.int64]
) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
    """Return the distinct experts of every step and layer.

    Args:
        trace: recorded routing.
        keep: bool [T, L, K], which of the routed experts are run.
        bounds: of its steps, see `step_bounds`.

    Returns:
        The sets of each layer one after another, ascending, int16 [L, T K]; where each begins and
        the last one ends, int32 [L, N+1].
    """
    from adapmoe_lab.simulation.replay.pool_loops import collect_sets

    n_tokens, n_layers, top_k = trace.expert_indices.shape
    members = np.empty((n_layers, n_tokens * top_k), dtype=np.int16)
    starts = np.empty((n_layers, len(bounds)), dtype=np.int32)
    keep = np.ascontiguousarray(keep)

    def collect(layer: int) -> None:
        last_step = np.full(trace.spec.n_experts, -1)
        own = members[layer], starts[layer]
        collect_sets(trace.expert_indices, keep, bounds, layer, last_step, *own)

    in_threads(collect, n_layers)
    return members, starts


def _oracle_inputs(
    trace: RoutingTrace,
    rule: int,
    members: NDArray[np.int16],
    starts: NDArray[np.int32],
    bounds: NDArray[np.int64],
    n_shared: int,
) -> NDArray[np.int32]:
    """Return what a rule is told of every use beforehand, int32 [L, T K], empty if nothing.

    `n_shared` layers share slots; the times of Belady's next uses count their steps.
    """
    from adapmoe_lab.simulation.replay.pool_loops import high_precision_uses, next_uses

    if rule not in (BELADY, HOBBIT):
        return np.empty((len(members), 0), dtype=np.int32)
    n_experts, bits = trace.spec.n_experts, trace.router_probs.view(np.uint16)
    oracle_inputs = np.empty(members.shape, dtype=np.int32)

    def fill(layer: int) -> None:
        own = members[layer], starts[layer]
        if rule == BELADY:
            never = np.full(n_experts, n_shared * len(bounds))
            next_uses(*own, layer % n_shared, n_shared, never, oracle_inputs[layer])
        else:
            scores = np.empty(n_experts, dtype=np.int64)
            high_precision_uses(
                *own, layer, bits, FIXED_SCORES, bounds, scores, oracle_inputs[layer]
            )

    in_threads(fill, len(members))
    return oracle_inputs


def in_threads(work: Callable[[int], None], n: int) -> None:
    """Do work 0..n-1, as many at once as there are cores."""
    if n == 1:
        work(0)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(work, range(n)):
            pass
