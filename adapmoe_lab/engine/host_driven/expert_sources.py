"""Where the engine takes an expert's weights from: a device cache, or the store itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.prefetch.prefetcher import Prefetcher
from adapmoe_lab.engine.store.expert_store import ExpertStore
from adapmoe_lab.engine.transfer.link import Link
from adapmoe_lab.engine.transfer.prefetch_copy import PrefetchCopy
from adapmoe_lab.models.experts import Weights
from adapmoe_lab.models.families import Router, UnsupportedModelError, router_scores
from adapmoe_lab.policies.allocation.slots import N_STAGING
from adapmoe_lab.policies.eviction.expert_cache import CacheState, ExpertCache, Load, StepPlan
from adapmoe_lab.policies.eviction.registry import policy_named
from adapmoe_lab.records import CachePlan, Traffic


class ExpertSource(Protocol):
    """Hands out the weights of the experts that one layer needs in one forward pass."""

    def fetch_experts(
        self, layer: int, experts: Collection[int], hidden: torch.Tensor
    ) -> Iterator[tuple[int, Weights]]:
        """Yield each expert once, with weights valid until the next one is asked for.

        `hidden` [T, D] is what the layer's router and experts are given.
        """
        ...


class StoredExperts:
    """Experts read straight from the store, for work in which residency plays no part."""

    def __init__(self, store: ExpertStore, device: torch.device) -> None:
        """Read from `store`, to tensors on `device`."""
        self._store = store
        self._device = device

    def fetch_experts(
        self, layer: int, experts: Collection[int], hidden: torch.Tensor
    ) -> Iterator[tuple[int, Weights]]:
        """Yield experts in ascending order; on the CPU without a copy."""
        for expert in sorted(experts):
            buffer = self._store.buffer(layer, expert).to(self._device)
            yield expert, self._store.views(layer, expert, buffer)


class CachedExperts:
    """Experts served from slots on the device and loaded over a link on a miss.

    Counters hold distinct experts per layer since the start; misses include streamed experts.
    """

    def __init__(
        self,
        store: ExpertStore,
        link: Link,
        device: torch.device,
        plan: CachePlan,
        eviction: str = "lru",
        routers: Sequence[Router] = (),
        prefetcher: Prefetcher | None = None,
    ) -> None:
        """Allocate the slots of a plan and the staging buffers; every slot starts empty.

        Args:
            store: where the experts lie on the host.
            link: what they cross.
            device: where the slots are.
            plan: how many slots there are, and who shares them.
            eviction: name of the policy that decides which expert leaves.
            routers: of every layer; used only for policies that read scores.
            prefetcher: what prefetches, if anything does.

        Raises:
            UnsupportedModelError: the policy reads scores that cannot be had of this model.
        """
        self._store = store
        self._link = link
        policy, n_experts = policy_named(eviction), store.expert_bytes.shape[1]
        self._routers = routers if policy.needs_scores else None
        if policy.needs_scores and not all(router.reads_experts_input for router in routers):
            raise UnsupportedModelError(
                f"Eviction {eviction!r} reads the router's scores, and this model's routers do not "
                "score what the experts are given; use another, such as 'lfu_aged'."
            )
        self.cache = ExpertCache(plan, n_experts, policy)
        self._slots = [
            torch.empty((plan.pool_slots(pool), width), dtype=torch.uint8, device=device)
            for pool, width in enumerate(self._pool_widths(plan))
        ]
        self._views: list[dict[int, Weights]] = [{} for _ in plan.slots]
        staging_bytes = 0 if plan.holds_all(n_experts) else int(store.expert_bytes.max())
        shape = (N_STAGING, staging_bytes)
        self._staging = torch.empty(shape, dtype=torch.uint8, device=device)
        self.prefetcher = prefetcher
        self.hits = np.zeros(store.n_layers, dtype=np.int64)
        self.misses = np.zeros(store.n_layers, dtype=np.int64)
        self._bytes_demanded = 0

    def close(self) -> None:
        """Give up slots, staging buffers and prefetcher; no expert can be fetched then."""
        self._slots, self._views, self.prefetcher = [], [], None
        self._staging = self._staging.new_empty(0)

    @property
    def plan(self) -> CachePlan:
        """How many slots there are, and who shares them."""
        return self.cache.plan

    @property
    def slots(self) -> Sequence[torch.Tensor]:
        """The slots of every pool, uint8 [S, bytes] each."""
        return self._slots

    def traffic(self, n_steps: int, kept: int, skipped: int) -> Traffic:
        """Return the counters since the start, with those that are counted outside."""
        ahead, nothing = self.prefetcher, np.zeros_like(self.hits)
        return Traffic(
            hits=self.hits.copy(),
            misses=self.misses.copy(),
            n_steps=n_steps,
            bytes_moved=self.bytes_moved,
            kept=kept,
            skipped=skipped,
            prefetch_used=ahead.used.copy() if ahead else nothing,
            prefetch_wasted=ahead.wasted.copy() if ahead else nothing,
        )

    @property
    def state(self) -> CacheState:
        """Residency, and what decides which expert leaves next."""
        return self.cache.state

    def adopt(self, state: CacheState) -> None:
        """Go on from residency that something else brought about in the same slots."""
        self.cache.restore(state)
        self._views = [{} for _ in self.plan.slots]
        for layer, expert in np.argwhere(state.slot_of >= 0).tolist():
            load = Load(layer, expert, int(state.slot_of[layer, expert]), None)
            self._views[layer][expert] = self._store.views(layer, expert, self._slot_of(load))

    @property
    def bytes_moved(self) -> int:
        """Bytes that crossed the link since the start, wasted ones included."""
        return self._bytes_demanded + (self.prefetcher.n_bytes if self.prefetcher else 0)

    def fetch_experts(
        self, layer: int, experts: Collection[int], hidden: torch.Tensor
    ) -> Iterator[tuple[int, Weights]]:
        """Yield the resident experts, then those prefetched, then the others as they arrive.

        Every copy that has room is issued at once; experts without a slot stream through the
        staging buffers, one loading while the other is read. A slot counts as holding an expert
        only after its copy was waited for: whatever stops the iteration in between leaves slots
        free, never wrong.
        """
        step = self.cache.plan_step(layer, experts, self._scores(layer, hidden))
        missing = {**{load.expert: load for load in step.loads}, **dict.fromkeys(step.streamed)}
        begun = self.prefetcher.resolve(layer, missing) if self.prefetcher else {}
        self.cache.vacate(step)
        try:
            yield from self._as_they_come(layer, step, missing, begun, hidden)
        finally:
            if self.prefetcher:
                self.prefetcher.release(layer)

    def _as_they_come(
        self,
        layer: int,
        step: StepPlan,
        missing: Mapping[int, Load | None],
        begun: Mapping[int, PrefetchCopy],
        hidden: torch.Tensor,
    ) -> Iterator[tuple[int, Weights]]:
        """Ask for all that is missing, then yield the experts of a step."""
        for copy in begun.values():
            self._link.finish(copy)
        loads = [load for load in step.loads if load.expert not in begun]
        streamed = [expert for expert in step.streamed if expert not in begun]
        loading = [(load, self._copy(layer, load.expert, self._slot_of(load))) for load in loads]
        buffers = list(self._staging)
        staged = [
            self._copy(layer, expert, buffer)
            for expert, buffer in zip(streamed, buffers, strict=False)
        ]
        self.hits[layer] += len(step.hits)
        self.misses[layer] += len(loads) + len(streamed)
        if self.prefetcher:
            self.prefetcher.on_experts_input(layer, hidden, self.cache, step, streamed[N_STAGING:])
        for expert in step.hits:
            yield expert, self._views[layer][expert]
        for expert, copy in begun.items():
            self._link.wait(copy.arrival)
            load, buffer = missing[expert], copy.destination
            if load is not None:
                buffer = self._slot_of(load)[: buffer.numel()].copy_(buffer)
                self._occupy(load, buffer)
            yield expert, self._store.views(layer, expert, buffer)
        for load, arrival in loading:
            self._link.wait(arrival)
            self._occupy(load, self._slot_of(load))
            yield load.expert, self._views[layer][load.expert]
        for position, expert in enumerate(streamed):
            buffer = buffers[position % N_STAGING]
            self._link.wait(staged[position])
            yield expert, self._store.views(layer, expert, buffer)
            if position + N_STAGING < len(streamed):
                staged.append(self._copy(layer, streamed[position + N_STAGING], buffer))

    def _pool_widths(self, plan: CachePlan) -> list[int]:
        """Return the bytes of a slot of each pool."""
        widths = [self._store.slot_bytes(layer) for layer in range(self._store.n_layers)]
        return [max(widths)] if plan.is_global else widths

    def _slot_of(self, load: Load) -> torch.Tensor:
        pool = 0 if self.plan.is_global else load.layer
        return self._slots[pool][load.slot]

    def _scores(self, layer: int, hidden: torch.Tensor) -> NDArray[np.float32] | None:
        if self._routers is None:
            return None
        return router_scores(self._routers[layer], hidden.detach()).cpu().numpy()

    def _occupy(self, load: Load, buffer: torch.Tensor) -> None:
        self._views[load.layer][load.expert] = self._store.views(load.layer, load.expert, buffer)
        self.cache.occupy(load)

    def _copy(self, layer: int, expert: int, target: torch.Tensor) -> object:
        buffer = self._store.buffer(layer, expert)
        self._bytes_demanded += buffer.numel()
        return self._link.copy(buffer, target[: buffer.numel()])
