"""The rules of a step: which experts are hits, which are loaded where, which only pass through.

What runs a model from the host follows this one class. Compiled replay and the device table follow
the same rules, so that their counters can be equal exactly.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.eviction.fixed_point import mean_score, score_sums, token_weight
from adapmoe_lab.policies.eviction.policy import PROTECTED, EvictionPolicy, Use
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
    """Residency, and what decides which expert leaves next, for another to go on from.

    Attributes:
        slot_of: int64 [L, E], each expert's slot in its layer's pool, -1 if it is not resident.
        priorities: int64 [L, E], of every expert.
        clocks: steps so far of every pool.
    """

    slot_of: NDArray[np.int64]
    priorities: NDArray[np.int64]
    clocks: tuple[int, ...]


class ExpertCache:
    """Which expert lies in which slot, and which leaves next.

    The layers of a pool share its slots: each layer has a pool of its own, or one holds them all.
    `slot_of` names only experts whose weights are wholly in their slot. A step is planned, then
    its victims are vacated, then each load is occupied once it has arrived; if anything stops the
    sequence in between, the slots concerned are simply free.

    Attributes:
        plan: how many slots there are, and which layers share them.
        slot_of: int64 [L, E], each expert's slot in its layer's pool, -1 if it is not resident.
    """

    def __init__(self, plan: CachePlan, n_experts: int, policy: EvictionPolicy) -> None:
        """Start empty.

        Raises:
            ValueError: the policy can only be simulated, or it and the plan disagree on pins.
        """
        policy.check_runnable()
        policy.check_plan(plan)
        self.plan = plan
        self._policy = policy
        shape = (len(plan.slots), n_experts)
        self.slot_of = np.full(shape, -1)
        self._priorities, self._state = np.zeros((2, *shape), dtype=np.int64)
        self._may_leave = ~plan.pinned_mask(n_experts)
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
        self._policy.check_scores(scores)
        members = np.array(sorted(experts), dtype=np.int64)
        is_hit = self.slot_of[layer, members] >= 0
        self._change_priorities(layer, members, is_hit, scores)
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

    def _change_priorities(
        self,
        layer: int,
        members: NDArray[np.int64],
        is_hit: NDArray[np.bool_],
        scores: NDArray[np.floating] | None,
    ) -> None:
        """Change the priorities as the policy says."""
        policy, (pool, first, end) = self._policy, self._pool_of(layer)
        clock, n_layers = self._clocks[pool], end - first
        self._clocks[pool] = clock + 1
        if policy.on_new_pass is not None and layer == first:
            self._priorities[first:end] = policy.on_new_pass(self._priorities[first:end])
        priorities, state, oracle_inputs = self._priorities[layer], self._state[layer], 0
        if policy.on_new_step is not None:
            priorities[:] = policy.on_new_step(priorities)
        if scores is not None:
            sums = score_sums(scores)
            if policy.on_scores is not None:
                means = mean_score(sums, token_weight(len(scores)))
                priorities[:] = policy.on_scores(priorities, means)
            oracle_inputs = self._oracle_inputs(sums[members])
        use = Use(is_hit.astype(np.int64), oracle_inputs, clock, n_layers, clock // n_layers)
        priorities[members], kept = policy.after_use(priorities[members], state[members], use)
        if policy.keeps_state:
            state[members] = kept

    def _oracle_inputs(self, scores: NDArray[np.int64]) -> Any:
        """Return the policy's oracle inputs of the members of a set, by their scores [n]."""
        if not callable(self._policy.oracle_input):
            return 0
        of_set = scores.tolist()
        known = [self._policy.oracle_input(of_set, own) for own in range(len(of_set))]
        return np.array(known, dtype=np.int64)

    def _free_places(self, layer: int, n_needed: int) -> list[tuple[int, tuple[int, int] | None]]:
        """Return free slots of a layer's pool, at most `n_needed`, which nothing leaves."""
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
        """Return slot and (layer, expert) of those that leave first, at most `n_needed`."""
        if n_needed == 0:
            return []
        pool, first, end = self._pool_of(layer)
        n_layers, penalty_per_layer = end - first, self._policy.penalty_per_layer
        candidates = (self.slot_of[first:end] >= 0) & self._may_leave[first:end]
        candidates[layer - first, members] = False
        keys = self._priorities[first:end]
        if penalty_per_layer is not None:
            layers_ahead = (np.arange(first, end) - layer) % n_layers
            n_passes = (self._clocks[pool] - 1) // n_layers
            keys = keys - (layers_ahead * penalty_per_layer(n_passes))[:, None]
        victims, flat = [], np.where(candidates, keys, PROTECTED).ravel()
        for _ in range(n_needed):
            lowest = int(flat.argmin())
            if flat[lowest] == PROTECTED:
                break
            flat[lowest] = PROTECTED
            victim = first + lowest // keys.shape[1], lowest % keys.shape[1]
            victims.append((int(self.slot_of[victim]), victim))
        return victims
