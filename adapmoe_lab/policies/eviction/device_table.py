"""The array form of a step's rules, that a step captured as a graph on the device follows.

Written in numpy, as the reference that kernels are held against: whole rows, no lists, and nothing
whose size depends on what is resident. Only policies that keep one priority per expert and change
those of the step's own layer can be followed so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.eviction.expert_cache import CacheState
from adapmoe_lab.policies.eviction.fixed_point import mean_score, score_sums, token_weight
from adapmoe_lab.policies.eviction.policy import PROTECTED, EvictionPolicy, Use
from adapmoe_lab.records import CachePlan


@dataclass(frozen=True, eq=False)
class DeviceStep:
    """What becomes of the members of a step's set, in the order they were given.

    Attributes:
        is_hit: bool [K], which were resident before the step.
        slot: int64 [K], where each lies after it: its own for a hit, the one to load it into for a
            miss, -1 for one that is streamed.
    """

    is_hit: NDArray[np.bool_]
    slot: NDArray[np.int64]


class DeviceTable:
    """Which expert lies in which slot, and which leaves next.

    The layers of a pool share its slots, as in `ExpertCache`. A step changes the table at once: on
    the device nothing stops between deciding and loading.

    Attributes:
        priority: int64 [L, E], by which experts leave, the smallest first.
        slot_of: int64 [L, E], each expert's slot in its pool, -1 if it is not resident.
        protected: int64 [L, E], `PROTECTED` for experts that never leave, 0 for the others.
        n_slots: int64 [P], slots of each pool.
        clock: int64 [P], steps of each pool so far.
    """

    def __init__(self, plan: CachePlan, n_experts: int, policy: EvictionPolicy) -> None:
        """Start empty.

        Raises:
            ValueError: the policy needs the host, or it and the plan disagree on pins.
        """
        policy.check_on_device()
        policy.check_plan(plan)
        self._policy, self._is_global = policy, plan.is_global
        shape = (len(plan.slots), n_experts)
        self.priority = np.zeros(shape, dtype=np.int64)
        self.slot_of = np.full(shape, -1, dtype=np.int64)
        self.protected = PROTECTED * plan.pinned_mask(n_experts).astype(np.int64)
        slots = [plan.pool_slots(pool) for pool in range(plan.n_pools)]
        self.n_slots = np.array(slots, dtype=np.int64)
        self.clock = np.zeros(plan.n_pools, dtype=np.int64)

    def take_over(self, state: CacheState) -> None:
        """Go on from where an `ExpertCache` of the same plan and policy is."""
        self.slot_of[:], self.priority[:] = state.slot_of, state.priorities
        self.clock[:] = state.clocks

    @property
    def state(self) -> CacheState:
        """A copy of the table, for an `ExpertCache` to go on from."""
        return CacheState(self.slot_of.copy(), self.priority.copy(), tuple(self.clock.tolist()))

    def step(
        self, layer: int, ids: NDArray[np.int64], scores: NDArray[np.floating] | None = None
    ) -> DeviceStep:
        """Decide a step and change the table as it says.

        Args:
            layer: whose experts.
            ids: int64 [K], the distinct experts that the step needs, ascending.
            scores: the router's scores [T, E] of the step's tokens, if the policy reads them.

        Raises:
            ValueError: it reads them, and there are none.
        """
        self._policy.check_scores(scores)
        policy, slot_of, priority = self._policy, self.slot_of[layer], self.priority[layer]
        pool, layers = self._pool_of(layer)
        clock, n_layers = self.clock[pool], len(self.slot_of[layers])
        is_hit = slot_of[ids] >= 0
        if policy.on_new_step is not None:
            priority[:] = policy.on_new_step(priority)
        if policy.on_scores is not None and scores is not None:
            mean = mean_score(score_sums(scores), token_weight(len(scores)))
            priority[:] = policy.on_scores(priority, mean)
        use = Use(is_hit.astype(np.int64), 0, clock, n_layers, clock // n_layers)
        priority[ids], _ = policy.after_use(priority[ids], 0, use)
        self.clock[pool] += 1
        for expert in ids[~is_hit]:
            slot_of[expert] = self._slot_for_one(layer, ids)
        return DeviceStep(is_hit, slot_of[ids].copy())

    def _pool_of(self, layer: int) -> tuple[int, slice]:
        """Return the number of a layer's pool, and the layers that share it."""
        return (0, slice(None)) if self._is_global else (layer, slice(layer, layer + 1))

    def _slot_for_one(self, layer: int, ids: NDArray[np.int64]) -> int:
        """Return the slot that one miss of a step gets, emptied if it was taken; -1 for none."""
        pool, layers = self._pool_of(layer)
        slot_of = self.slot_of[layers]  # [layers of the pool, E]
        is_free = ~np.isin(np.arange(self.n_slots[pool]), slot_of)  # [S]
        if is_free.any():
            return int(is_free.argmax())  # the lowest
        may_leave = (self.slot_of >= 0) & (self.protected == 0)
        may_leave[layer, ids] = False
        key = np.where(may_leave, self.priority, PROTECTED)[layers]
        victim = np.unravel_index(key.argmin(), key.shape)  # the first of equals: the lowest
        if key[victim] == PROTECTED:
            return -1
        slot = int(slot_of[victim])
        slot_of[victim] = -1
        return slot
