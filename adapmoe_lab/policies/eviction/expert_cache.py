"""The rules of a step: which experts are hits, which are loaded where, which only pass through.

What runs a model follows this one class; compiled replay follows the same rules, so that their
counters can be equal exactly.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.eviction.rules import (
    FIXED_SCORES,
    HOBBIT,
    NEVER_LEAVES,
    EvictionPolicy,
    after_use,
    distance_penalty,
    is_high_precision,
    mean_score,
    priority_in_new_pass,
    priority_in_new_step,
    token_weight,
)
from adapmoe_lab.records import CachePlan


@dataclass(frozen=True)
class Load:
    """One expert to bring into a slot, and the (layer, expert) that leaves it."""

    layer: int
    expert: int
    slot: int
    evicted: tuple[int, int] | None


@dataclass(frozen=True)
class StepPlan:
    """What one layer does for the distinct experts of one forward pass.

    Attributes:
        hits: experts resident before the step, ascending.
        loads: misses that get a slot, ascending by expert.
        streamed: misses that pass through staging uncached, ascending.
    """

    hits: tuple[int, ...]
    loads: tuple[Load, ...]
    streamed: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CacheState:
    """Residency, and what decides who leaves next, for another to go on from.

    Attributes:
        slot_of: int64 [L, E], each expert's slot in its layer's pool, -1 if it is not resident.
        priorities: int64 [L, E], of every expert.
        clocks: steps so far of every pool.
    """

    slot_of: NDArray[np.int64]
    priorities: NDArray[np.int64]
    clocks: tuple[int, ...]


class ExpertCache:
    """Residency of experts: who lies in which slot, and who leaves next.

    The layers of a pool share its slots: each layer has a pool of its own, or one holds them all.
    `slot_of` names only experts whose weights are wholly in their slot. A step is planned, then
    its victims are vacated, then each load is occupied once it has arrived; if anything stops the
    sequence in between, the slots concerned are simply free.

    Attributes:
        plan: how many slots there are, and who shares them.
        slot_of: int64 [L, E], each expert's slot in its layer's pool, -1 if it is not resident.
    """

    def __init__(self, plan: CachePlan, n_experts: int, policy: EvictionPolicy) -> None:
        """Start empty.

        Raises:
            ValueError: the policy would have to know the future.
        """
        if policy.needs_future:
            raise ValueError(
                f"Eviction {policy.name!r} reads what comes later; it can be simulated, not run."
            )
        self.plan = plan
        self._policy = policy
        shape = (len(plan.slots), n_experts)
        self.slot_of = np.full(shape, -1)
        self._priorities, self._state = np.zeros((2, *shape), dtype=np.int64)
        self._may_leave = ~plan.pinned_mask(n_experts) if policy.pins else np.ones(shape, bool)
        self._clocks = [0] * plan.n_pools

    def plan_step(
        self, layer: int, experts: Collection[int], scores: NDArray[np.floating] | None = None
    ) -> StepPlan:
        """Note a step for a set of distinct experts and decide it; nothing moves yet.

        No member of the set is evicted during its step. Misses are given slots in ascending
        order, free slots first, then those of the experts that leave; the rest stream.

        Args:
            layer: whose experts.
            experts: the distinct experts that the forward pass needs there.
            scores: the router's scores [T, E] of the pass's tokens, if the policy needs them.

        Raises:
            ValueError: it needs them, and there are none.
        """
        if self._policy.needs_scores and scores is None:
            raise ValueError(
                f"Eviction {self._policy.name!r} reads the router's scores; give those of the "
                "step's tokens."
            )
        members = np.array(sorted(experts), dtype=np.int64)
        is_hit = self.slot_of[layer, members] >= 0
        self._note(layer, members, is_hit, scores)
        hits, misses = members[is_hit].tolist(), members[~is_hit].tolist()
        if not misses:
            return StepPlan(tuple(hits), (), ())
        places = self._free_places(layer, len(misses))
        places += self._victims(layer, members, len(misses) - len(places))
        loads = tuple(
            Load(layer, expert, slot, evicted)
            for expert, (slot, evicted) in zip(misses, places, strict=False)
        )
        return StepPlan(tuple(hits), loads, tuple(misses[len(loads) :]))

    @property
    def state(self) -> CacheState:
        """A copy of what a policy that keeps priorities only needs to go on."""
        return CacheState(self.slot_of.copy(), self._priorities.copy(), tuple(self._clocks))

    def restore(self, state: CacheState) -> None:
        """Go on from a state of the same plan and policy."""
        self.slot_of[:] = state.slot_of
        self._priorities[:] = state.priorities
        self._clocks = list(state.clocks)

    def vacate(self, plan: StepPlan) -> None:
        """Take the plan's victims out, before any slot is overwritten."""
        for load in plan.loads:
            if load.evicted is not None:
                self.slot_of[load.evicted] = -1

    def occupy(self, load: Load) -> None:
        """Note that a loaded expert has arrived in its slot."""
        self.slot_of[load.layer, load.expert] = load.slot

    def _pool_of(self, layer: int) -> tuple[int, int, int]:
        """Return the number of a layer's pool, its first layer, and the one after its last."""
        if self.plan.is_global:
            return 0, 0, len(self.slot_of)
        return layer, layer, layer + 1

    def _note(
        self,
        layer: int,
        members: NDArray[np.int64],
        is_hit: NDArray[np.bool_],
        scores: NDArray[np.floating] | None,
    ) -> None:
        """Change the priorities as the policy says."""
        pool, first, end = self._pool_of(layer)
        rule, clock = self._policy.rule, self._clocks[pool]
        self._clocks[pool] = clock + 1
        if layer == first:
            in_pool = self._priorities[first:end]
            in_pool[:] = priority_in_new_pass(rule, in_pool)
        priorities, state, oracle_input = self._priorities[layer], self._state[layer], 0
        if scores is not None:
            total = score_sums(scores)
            mean = mean_score(total, token_weight(len(scores)))
            priorities[:] = priority_in_new_step(rule, priorities, mean)
            oracle_input = high_precision_uses(total[members]) if rule == HOBBIT else 0
        else:
            priorities[:] = priority_in_new_step(rule, priorities, 0)
        priorities[members], state[members] = after_use(
            rule,
            priorities[members],
            state[members],
            is_hit.astype(np.int64),
            oracle_input,
            clock,
            end - first,
            clock // (end - first),
        )

    def _free_places(self, layer: int, n_needed: int) -> list[tuple[int, tuple[int, int] | None]]:
        """Return free slots of a layer's pool, at most `n_needed`, with no one who leaves them."""
        pool, first, end = self._pool_of(layer)
        slots, n_slots = self.slot_of[first:end], self.plan.pool_slots(pool)
        taken = slots[slots >= 0]
        if len(taken) == n_slots:
            return []
        is_free = np.ones(n_slots, dtype=np.bool_)
        is_free[taken] = False
        return [(slot, None) for slot in is_free.nonzero()[0][:n_needed].tolist()]

    def _victims(
        self, layer: int, members: NDArray[np.int64], n_needed: int
    ) -> list[tuple[int, tuple[int, int] | None]]:
        """Return slots and (layer, expert) of those that leave first, at most `n_needed`."""
        if n_needed == 0:
            return []
        pool, first, end = self._pool_of(layer)
        rule, n_layers = self._policy.rule, end - first
        candidates = (self.slot_of[first:end] >= 0) & self._may_leave[first:end]
        candidates[layer - first, members] = False
        keys = self._priorities[first:end]
        if n_layers > 1:
            layers_ahead = (np.arange(first, end) - layer) % n_layers
            n_passes = (self._clocks[pool] - 1) // n_layers
            keys = keys - distance_penalty(rule, layers_ahead, n_passes)[:, None]
        victims, flat = [], np.where(candidates, keys, NEVER_LEAVES).ravel()
        for _ in range(n_needed):
            lowest = int(flat.argmin())
            if flat[lowest] == NEVER_LEAVES:
                break
            flat[lowest] = NEVER_LEAVES
            victim = first + lowest // keys.shape[1], lowest % keys.shape[1]
            victims.append((int(self.slot_of[victim]), victim))
        return victims


def score_sums(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return the sums [E] of router scores [T, E] in fixed point, of what a trace keeps of them."""
    bits = scores.astype(np.float16).view(np.uint16)
    return FIXED_SCORES[bits].sum(axis=0, dtype=np.int64)


def high_precision_uses(scores: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which members of a set HOBBIT would load in high precision, by their scores [n]."""
    ranks_above = scores[None] > scores[:, None]
    return is_high_precision((ranks_above * scores).sum(axis=1), scores.sum())
