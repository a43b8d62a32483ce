"""What goes where, decided and shown before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.device import device_name
from adapmoe_lab.models.checkpoint.footprint import (
    default_context_tokens,
    kv_cache_bytes,
    score_bytes,
    work_bytes,
)
from adapmoe_lab.models.checkpoint.meta_model import DTYPES, MetaModel
from adapmoe_lab.policies.allocation.slots import N_STAGING, budget_bytes, uniform_plan
from adapmoe_lab.records import CachePlan, MoESpec
from adapmoe_lab.records.arguments import whole_number

HEADROOM = 0.9
"""Share of free memory that is planned with; the rest is for fragmentation and other programs."""


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that are free on a device and on its host; the same if the device is the CPU."""

    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes a model takes beside its experts.

    Attributes:
        weights: all other weights.
        kv_cache: keys and values of the longest context planned for.
        work: activations of a whole prompt.
        context_tokens: tokens per sequence that were planned for.
        batch_size: sequences at once.
    """

    weights: int
    kv_cache: int
    work: int
    context_tokens: int
    batch_size: int

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.weights + self.kv_cache + self.work

    def __str__(self) -> str:
        """Describe it in one line."""
        return (
            f"{in_words(self.weights)} weights, {in_words(self.kv_cache)} keys and values of "
            f"{self.batch_size} x {self.context_tokens} tokens, {in_words(self.work)} activations"
        )


@dataclass(frozen=True, eq=False)
class MemoryPlan:
    """Where a model's bytes will lie.

    Attributes:
        device: the compute device.
        needs: what is taken beside the experts.
        slots: the experts' room on the device.
        slot_bytes: bytes of that room, staging included.
        surrogate_bytes: bytes of surrogates of skipped experts.
        prefetch_bytes: bytes of the buffer for prefetched experts, and of fitted predictors.
        device_bytes: free bytes on the device that were planned with.
        store_bytes: bytes of all experts.
        host_bytes: bytes of host memory for the store; less than `store_bytes` leaves it on disk.
    """

    device: torch.device
    needs: MemoryNeeds
    slots: CachePlan
    slot_bytes: int
    surrogate_bytes: int
    prefetch_bytes: int
    device_bytes: int
    store_bytes: int
    host_bytes: int

    @property
    def fits_host(self) -> bool:
        """Whether all experts fit into host memory."""
        return self.store_bytes <= self.host_bytes

    def __str__(self) -> str:
        """Describe it in two lines."""
        store = "in host memory" if self.fits_host else "on disk"
        if not self.fits_host and self.host_bytes > 0:
            store += f", the last {in_words(self.host_bytes)} read kept in host memory"
        beside = f"surrogates: {in_words(self.surrogate_bytes)}; " if self.surrogate_bytes else ""
        if self.prefetch_bytes:
            beside += f"prefetch: {in_words(self.prefetch_bytes)}; "
        return (
            f"on {device_name(self.device)}, {in_words(self.device_bytes)} to plan with: "
            f"{self.needs}\nexpert slots: {self.slots.n_slots} of {in_words(self.slot_bytes)} "
            f"together; {beside}all experts: {in_words(self.store_bytes)} {store}"
        )


def memory_needs(
    model: MetaModel,
    top_k: int,
    device: torch.device,
    context_tokens: int | None = None,
    batch_size: int = 1,
) -> MemoryNeeds:
    """Return what a model takes beside its experts."""
    if context_tokens is None:
        context_tokens = default_context_tokens(model.config)
    tokens = whole_number("max_context_tokens", context_tokens, at_least=1)
    item_bytes = DTYPES[model.dtype].itemsize
    work = work_bytes(model.config, tokens, batch_size, top_k, item_bytes)
    is_eager = model.config._attn_implementation == "eager"
    if is_eager or (device.type == "cuda" and model.dtype == "float32"):
        work += score_bytes(model.config, tokens, batch_size)
    return MemoryNeeds(
        weights=model.other_bytes,
        kv_cache=kv_cache_bytes(model.config, tokens * batch_size, item_bytes),
        work=work,
        context_tokens=tokens,
        batch_size=batch_size,
    )


def plan_memory(
    spec: MoESpec,
    needs: MemoryNeeds,
    device: torch.device,
    *,
    expert_memory: str | float | None = None,
    host_memory: str | float | None = None,
    slots: CachePlan | None = None,
    surrogate_bytes: int = 0,
    prefetch_bytes: int = 0,
    free: FreeMemory | None = None,
) -> MemoryPlan:
    """Decide how many experts get a slot, and whether the rest waits in memory or on disk.

    Args:
        spec: the model, and how its experts are stored.
        needs: what it takes beside its experts.
        device: where it computes.
        expert_memory: room for experts and their surrogates on the device; None takes what is
            left.
        host_memory: host memory for experts, slots included on the CPU; None takes what is free.
        slots: the slots of a tuned config, which then decide.
        surrogate_bytes: bytes of surrogates of skipped experts.
        prefetch_bytes: bytes of the buffer for prefetched experts, and of fitted predictors.
        free: what is free; what is so now on this machine if None.

    Raises:
        MemoryError: it does not fit; the text has the numbers and the most that does.
        ValueError: the room is too small for one expert per layer.
    """
    free = free_memory(device) if free is None else free
    beside_bytes = surrogate_bytes + prefetch_bytes
    host = budget_bytes(host_memory, spec, "host_memory") if host_memory is not None else None
    room = _Room(spec, needs, device, free, host)
    if slots is None:
        slots = room.slots(expert_memory, beside_bytes)
    taken = planned_bytes(slots, spec.stored_bytes) + beside_bytes
    room.check(taken)
    return MemoryPlan(
        device=device,
        needs=needs,
        slots=slots,
        slot_bytes=taken - beside_bytes,
        surrogate_bytes=surrogate_bytes,
        prefetch_bytes=prefetch_bytes,
        device_bytes=int(HEADROOM * free.device_bytes),
        store_bytes=spec.all_experts_bytes,
        host_bytes=room.host_bytes(taken),
    )


@dataclass(frozen=True, eq=False)
class _Room:
    """What is left for experts on a device and its host.

    Attributes:
        spec: the model, and how its experts are stored.
        needs: what it takes beside its experts.
        device: where it computes.
        free: what is free before anything is loaded.
        host: host memory that the user gives to experts, in bytes; None for what is free.
    """

    spec: MoESpec
    needs: MemoryNeeds
    device: torch.device
    free: FreeMemory
    host: int | None

    @property
    def left(self) -> int:
        """Bytes for experts on the device; below zero if even the rest does not fit."""
        left = int(HEADROOM * self.free.device_bytes) - self.needs.total
        is_shared = self.device.type == "cpu" and self.host is not None
        return min(left, self.host) if is_shared else left

    def slots(self, expert_memory: str | float | None, beside_bytes: int) -> CachePlan:
        """Return slots in the memory that is asked for; in what is left, if None.

        Raises:
            MemoryError: not even one expert per layer fits.
            ValueError: what is asked for is too little for that.
        """
        spec, slot_bytes = self.spec, self.spec.slot_bytes
        if expert_memory is not None:
            return uniform_plan(spec, budget_bytes(expert_memory, spec), beside_bytes=beside_bytes)
        every_slot = spec.n_experts * int(slot_bytes.sum()) + beside_bytes
        on_host = spec.all_experts_bytes if self.device.type == "cpu" else 0
        room = every_slot if every_slot + on_host <= self.left else self.left
        least = int(slot_bytes.sum() + N_STAGING * slot_bytes.max()) + beside_bytes
        if room < min(least, every_slot) and self.host is None:
            raise MemoryError(self._refusal(least))
        return uniform_plan(spec, room, beside_bytes=beside_bytes)

    def check(self, taken: int) -> None:
        """Raise MemoryError if so many bytes are more than is left."""
        if taken > max(self.left, 0):
            raise MemoryError(self._refusal(taken))

    def host_bytes(self, taken: int) -> int:
        """Return the host memory left for the store when so much is taken on the device."""
        if self.device.type == "cpu":
            return max(0, self.left - taken)
        free = int(HEADROOM * self.free.host_bytes) - self.needs.weights
        return max(0, free if self.host is None else min(self.host, free))

    def _refusal(self, taken: int) -> str:
        spec, most = self.spec, max(0, self.left)
        advice = (
            f"give expert_memory={in_words(most)!r} or less"
            if most >= (spec.n_layers + N_STAGING) * spec.stored_expert_bytes
            else "give a smaller max_context_tokens or batch_size, or a lower expert_dtype"
        )
        return (
            f"{spec.model_id} does not fit {self.device}: {in_words(taken)} of expert slots and "
            f"{self.needs}, of {in_words(self.free.device_bytes)} free ({1 - HEADROOM:.0%} kept "
            f"back). At most {in_words(most)} are left for experts: {advice}."
        )


def planned_bytes(slots: CachePlan, expert_bytes: NDArray[np.int64]) -> int:
    """Return the device bytes of a plan's slots, with staging where not every expert has one."""
    slot_bytes, widest = expert_bytes.max(axis=1), int(expert_bytes.max())
    staging = 0 if slots.holds_all(expert_bytes.shape[1]) else N_STAGING * widest
    if slots.is_global:
        return slots.n_slots * widest + staging
    return int((slots.slots * slot_bytes).sum()) + staging


def free_memory(device: torch.device) -> FreeMemory:
    """Return what is free on this machine now."""
    return FreeMemory(_free_bytes(device), psutil.virtual_memory().available)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def in_words(n_bytes: float) -> str:
    """Return bytes, rounded down, as text that `expert_memory` understands, such as `8.00GiB`."""
    if n_bytes >= 2**30:
        return f"{int(n_bytes / 2**30 * 100) / 100:.2f}GiB"
    return f"{int(n_bytes / 2**20 * 10) / 10:.1f}MiB"
