"""Residency, gating and counters of a captured step, in device tensors that never move."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.engine.graph.operators import Decision, decide, prepare_policy
from adapmoe_lab.engine.graph.step_kernel import QUANTITIES
from adapmoe_lab.policies.eviction.expert_cache import CacheState
from adapmoe_lab.policies.eviction.policy import EvictionPolicy
from adapmoe_lab.records import OFF, CachePlan, GatingTable


class StepTables:
    """What the steps of all layers read and change on the device.

    Slots, quotas, pinned experts and cuts are contents: changing them needs no other kernel.
    Policy, number of experts and whether layers share their slots are part of the kernel.
    """

    def __init__(
        self,
        host_addresses: ArrayLike,
        policy: EvictionPolicy,
        is_shared: bool,
        top_k: int,
        device: torch.device,
    ) -> None:
        """Make the tensors; `begin` fills them.

        Args:
            host_addresses: int64 [L, E], where every expert lies in pinned memory.
            policy: who leaves first.
            is_shared: whether the layers share their slots.
            top_k: experts that a token chooses.
            device: where to.

        Raises:
            ValueError: the policy needs the host.
            PolicyError: its functions cannot be compiled.
        """
        policy.check_on_device()
        hosts = np.asarray(host_addresses, dtype=np.int64)
        n_layers, n_experts = hosts.shape
        pools = (1, n_layers * n_experts) if is_shared else (n_layers, n_experts)

        def filled(value: float, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self._policy, self._is_shared = policy, is_shared
        self._code = prepare_policy(policy)
        self._host_addresses = torch.from_numpy(hosts).to(device)
        self._slot_of = filled(-1, hosts.shape, torch.int32)
        self._priority = filled(0, hosts.shape, torch.int64)
        self._is_pinned = filled(0, hosts.shape, torch.int32)
        self._clocks = filled(0, pools[:1], torch.int64)
        self._slot_addresses = filled(0, pools, torch.int64)
        self._free_slots = filled(0, pools, torch.int32)
        self._n_free = filled(0, pools[:1], torch.int32)
        self._counters = filled(0, (3, n_layers), torch.int64)
        self._cuts = filled(OFF, (n_layers, max(1, top_k - 1)), torch.float32)
        self._gating = filled(QUANTITIES[None], (2,), torch.int32)
        self._is_rehearsal = filled(0, (1,), torch.int32)

    def begin(
        self, plan: CachePlan, slot_addresses: Sequence[Sequence[int]], gating: GatingTable | None
    ) -> None:
        """Start afresh with the empty slots of a plan, counters at zero.

        Args:
            plan: how many slots there are.
            slot_addresses: where each slot of every pool lies.
            gating: what is skipped.
        """
        places = np.zeros(self._slot_addresses.shape, dtype=np.int64)
        for pool, addresses in enumerate(slot_addresses):
            usable = list(addresses)[: places.shape[1]]  # there may be more than experts
            places[pool, : len(usable)] = usable
        self._n_slots = [min(len(addresses), places.shape[1]) for addresses in slot_addresses]
        _fill(self._slot_addresses, places)
        _fill(self._is_pinned, plan.pinned_mask(self._slot_of.shape[1]))
        self._counters.zero_()
        self.rehearse(False)
        self.gate(gating)
        shape = tuple(self._slot_of.shape)
        nothing = np.zeros(shape, dtype=np.int64)
        self.take_over(CacheState(nothing - 1, nothing, (0,) * len(self._n_slots)))

    def gate(self, gating: GatingTable | None) -> None:
        """Skip by a table of cuts from now on, or nothing."""
        is_renormalised = gating is not None and gating.renormalise
        quantity = QUANTITIES[gating.quantity if gating is not None else None]
        _fill(self._gating, np.array([quantity, is_renormalised]))
        if gating is not None and gating.top_k > 1:
            _fill(self._cuts, gating.cuts.copy())

    def rehearse(self, is_rehearsal: bool) -> None:
        """Let the next steps change neither residency nor counters, or let them again."""
        self._is_rehearsal.fill_(int(is_rehearsal))

    def take_over(self, state: CacheState) -> None:
        """Go on from the residency that the host knows."""
        _fill(self._slot_of, state.slot_of)
        _fill(self._priority, state.priorities)
        _fill(self._clocks, np.array(state.clocks))
        free, n_free = np.zeros(self._free_slots.shape, dtype=np.int64), []
        by_pool = [state.slot_of] if self._is_shared else state.slot_of
        for pool, (n_slots, slots) in enumerate(zip(self._n_slots, by_pool, strict=True)):
            unused = np.setdiff1d(np.arange(n_slots), slots)[::-1]
            free[pool, : len(unused)] = unused
            n_free.append(len(unused))
        _fill(self._free_slots, free)
        _fill(self._n_free, np.array(n_free))

    def state(self) -> CacheState:
        """Return residency for the host to go on from; waits for the device."""
        slot_of, priority = self._slot_of.cpu().numpy(), self._priority.cpu().numpy()
        return CacheState(slot_of.astype(np.int64), priority.copy(), tuple(self._clocks.tolist()))

    @property
    def counts(self) -> NDArray[np.int64]:
        """Hits, misses, and choices that were not run, of every layer, [3, L]; waits for it."""
        return self._counters.cpu().numpy().copy()

    def decide(
        self,
        layer: int,
        ids: torch.Tensor,
        weights: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> Decision:
        """Decide a one-token step, and return what is to be done.

        Args:
            layer: whose experts.
            ids: int64 [K], what the router chose, all different; E means no expert.
            weights: [K], its own weights.
            scores: [E], its scores, if the policy reads them.

        Raises:
            ValueError: it reads them, and there are none.
            PolicyError: its functions do not compile.
        """
        self._policy.check_scores(scores)
        return Decision(
            *decide(
                ids, weights, scores, self._cuts, self._gating, self._slot_of, self._priority,
                self._is_pinned, self._clocks, self._free_slots, self._n_free, self._counters,
                self._host_addresses, self._slot_addresses, self._is_rehearsal, self._code, layer,
            )
        )  # fmt: skip


def _fill(tensor: torch.Tensor, values: NDArray) -> None:
    """Change the contents of a tensor."""
    tensor.copy_(torch.from_numpy(np.ascontiguousarray(values)))
