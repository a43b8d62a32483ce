"""Replay of a recorded trace through gating and cache, by the step rules."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.eviction.fixed_point import FIXED_SCORES
from adapmoe_lab.policies.eviction.policy import EvictionPolicy
from adapmoe_lab.policies.eviction.registry import policy_named
from adapmoe_lab.records import CachePlan, RoutingTrace
from adapmoe_lab.simulation.replay.expert_sets import expert_sets, in_threads
from adapmoe_lab.simulation.replay.pool import Predicted, Scores, Steps, empty_pool
from adapmoe_lab.simulation.replay.recorded_candidates import NO_CANDIDATES, Candidates, step_bounds


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
        outcomes: int8 [L, T K], what became of each, as `replay.outcomes` names it.
        absent: bool [J, N, L, C], which candidates were not resident when predicted.
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
    half a second more, the first call of a policy on a machine some seconds: its loops are
    compiled then.

    Args:
        trace: recorded routing; tokens that share a step are run together.
        keep: which of the routed experts are run.
        plan: slots per layer, or shared by all.
        eviction: name of a policy, those that need the future included.
        candidates: predicted experts whose residency is wanted. Prefetch leaves the cache as it is
            without.

    Raises:
        ValueError: there is no such policy, or it and the plan disagree on pins.
        RecordError: the policy reads the router's scores, and the trace is without.
    """
    policy, spec = policy_named(eviction), trace.spec
    from adapmoe_lab.simulation.replay.pool_loops import pool_replay

    replay_pool = pool_replay(policy)
    plan = plan if plan is not None else slots_plan(spec, spec.n_experts)
    policy.check_plan(plan)
    pinned = plan.pinned_mask(spec.n_experts)
    bounds = step_bounds(trace)
    n_shared = spec.n_layers // plan.n_pools  # layers per pool
    scores = _scores(policy, trace)
    members, starts = expert_sets(trace, keep, bounds)
    of_layers = Steps(bounds, members, starts, _no_inputs(policy, members), first_layer=0)
    _fill_oracle_inputs(policy, of_layers, scores, n_shared)
    counts = np.empty((plan.n_pools, len(bounds) - 1, n_shared, 3), dtype=np.int16)
    outcomes = np.empty(members.shape, dtype=np.int8)
    absent = np.zeros(candidates.experts.shape, dtype=np.bool_)
    predicted = Predicted(candidates.distances, candidates.experts, absent)

    def replay_one(pool: int) -> None:
        own = slice(pool * n_shared, (pool + 1) * n_shared)
        kept, steps = empty_pool(pinned[own]), of_layers.layers(own)
        n_slots = plan.pool_slots(pool)
        replay_pool(n_slots, kept, steps, scores, predicted, counts[pool], outcomes[own])

    in_threads(replay_one, plan.n_pools)
    hits, loads, streamed = counts.transpose(3, 1, 0, 2).reshape(3, -1, spec.n_layers)
    is_decode = trace.is_decode[bounds[:-1]]
    return Replay(hits, loads, streamed, is_decode, members, starts, outcomes, absent)


def _scores(policy: EvictionPolicy, trace: RoutingTrace) -> Scores:
    """Return the router's scores of a trace; zeros if it has none and the policy reads none."""
    if trace.router_probs is None and not policy.needs_scores:
        shape = trace.n_tokens, trace.spec.n_layers, trace.spec.n_experts
        bits = np.zeros(shape, dtype=np.uint16)
        bits.flags.writeable = False
    else:
        bits = trace.all_router_probs().view(np.uint16)
    return Scores(bits, FIXED_SCORES)


def _no_inputs(policy: EvictionPolicy, members: NDArray[np.int16]) -> NDArray[np.int32]:
    """Return room for the oracle input of every member, none for a policy without."""
    return np.empty(members.shape if policy.oracle_input else (len(members), 0), dtype=np.int32)


def _fill_oracle_inputs(
    policy: EvictionPolicy, steps: Steps, scores: Scores, n_shared: int
) -> None:
    """Fill in the oracle input of every use of all layers, for policies that have one.

    `n_shared` layers share slots; the times of next uses count their steps.
    """
    n_experts, n_layers = scores.bits.shape[2], len(steps.members)
    if callable(policy.oracle_input):
        from adapmoe_lab.simulation.replay.pool_loops import score_oracle

        ask = score_oracle(policy.oracle_input)

        def fill(layer: int) -> None:
            ask(steps, scores, layer, *np.empty((2, n_experts), dtype=np.int64))

        in_threads(fill, n_layers)
    elif policy.needs_future:
        from adapmoe_lab.simulation.replay.set_loops import next_uses

        def look_ahead(layer: int) -> None:
            never = np.full(n_experts, n_shared * len(steps.bounds))
            own = steps.members[layer], steps.starts[layer]
            next_uses(*own, layer % n_shared, n_shared, never, steps.oracle_inputs[layer])

        in_threads(look_ahead, n_layers)
