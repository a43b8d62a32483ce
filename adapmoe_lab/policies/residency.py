"""The rules of a step: which experts are hits, which are loaded where, which only pass through.

Simulation and engine both follow this one class, so that their counters can be equal exactly.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from adapmoe_lab.policies.eviction import LRU, EvictionPolicy


@dataclass(frozen=True)
class Load:
    """One expert to bring into a slot, and the expert that leaves it."""

    expert: int
    slot: int
    evicted: int | None


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

    @property
    def n_misses(self) -> int:
        """Experts that must cross the link."""
        return len(self.loads) + len(self.streamed)


class LayerCache:
    """Residency of one layer's experts: which expert lies in which slot, and who leaves next.

    `slot_of` names only experts whose weights are wholly in their slot. A step is planned, then
    its victims are vacated, then each load is occupied once it has arrived; if anything stops the
    sequence in between, the slots concerned are simply free.
    """

    def __init__(self, n_slots: int, policy: EvictionPolicy | None = None) -> None:
        """Start empty with room for `n_slots` experts."""
        self.n_slots = n_slots
        self.policy = policy if policy is not None else LRU()
        self.slot_of: dict[int, int] = {}

    def plan(self, experts: Collection[int]) -> StepPlan:
        """Decide a step for a set of distinct experts; nothing changes yet.

        No member of the set is evicted during its step. Misses are given slots in ascending
        order, free slots first, then those of the experts that leave; the rest stream.
        """
        members = sorted(experts)
        hits = tuple(expert for expert in members if expert in self.slot_of)
        misses = [expert for expert in members if expert not in self.slot_of]
        if not misses:
            return StepPlan(hits, (), ())
        room = self.n_slots - len(hits)
        placed, streamed = misses[:room], misses[room:]
        taken = set(self.slot_of.values())
        places: list[tuple[int, int | None]] = [
            (slot, None) for slot in range(self.n_slots) if slot not in taken
        ]
        if len(places) < len(placed):
            outsiders = self.slot_of.keys() - set(members)
            leaving = self.policy.leaving_order(outsiders)
            places += [(self.slot_of[expert], expert) for expert in leaving]
        loads = tuple(
            Load(expert, slot, evicted)
            for expert, (slot, evicted) in zip(placed, places, strict=False)
        )
        return StepPlan(hits, loads, tuple(streamed))

    def vacate(self, plan: StepPlan) -> None:
        """Take the plan's victims out, and note its hits, before any slot is overwritten."""
        for load in plan.loads:
            if load.evicted is not None:
                self.slot_of.pop(load.evicted, None)
                self.policy.removed(load.evicted)
        for expert in plan.hits:
            self.policy.used(expert)

    def occupy(self, load: Load) -> None:
        """Note that a loaded expert has arrived in its slot.

        The policy learns of it first: an interrupt in between must not leave a resident expert
        that can never be asked to leave.
        """
        self.policy.used(load.expert)
        self.slot_of[load.expert] = load.slot

    def step(self, experts: Collection[int]) -> StepPlan:
        """Plan a step and carry it out on the bookkeeping alone, as simulation does."""
        plan = self.plan(experts)
        self.vacate(plan)
        for load in plan.loads:
            self.occupy(load)
        return plan

    def clear(self) -> None:
        """Forget every resident expert."""
        for expert in list(self.slot_of):
            self.slot_of.pop(expert)
            self.policy.removed(expert)
