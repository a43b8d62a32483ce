"""Where the engine takes an expert's weights from: a device cache, or the store itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.host_driven.layer_step import GroupedFetch, LayerStep, in_groups
from adapmoe_lab.engine.prefetch.prefetcher import Prefetcher
from adapmoe_lab.engine.store.expert_store import ExpertStore
from adapmoe_lab.engine.transfer.link import Link
from adapmoe_lab.models.experts import Weights
from adapmoe_lab.models.families import Router, UnsupportedModelError, router_scores
from adapmoe_lab.policies.allocation.slots import N_STAGING
from adapmoe_lab.policies.eviction.expert_cache import CacheState, ExpertCache, Load
from adapmoe_lab.policies.eviction.registry import policy_named
from adapmoe_lab.records import CachePlan, Traffic

N_LOAD_GROUPS = 2
"""Groups that loads are waited for in: one is multiplied while the next is on its way."""

MOST_STREAMED = 8
"""Experts without a slot in a group, at most."""

STAGING_SHARE = 1 / 32
"""What staging such groups may take beyond what is planned for, as a share of the slots' bytes."""


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
        self._slot_rows = [pool.unbind() for pool in self._slots]
        self._views: list[dict[int, Weights]] = [{} for _ in plan.slots]
        staging_bytes = 0 if plan.holds_all(n_experts) else int(store.expert_bytes.max())
        shape = (N_STAGING, staging_bytes)
        self._staging = torch.empty(shape, dtype=torch.uint8, device=device)
        self._group_staging: torch.Tensor | None = None
        self.prefetcher = prefetcher
        self.hits = np.zeros(store.n_layers, dtype=np.int64)
        self.misses = np.zeros(store.n_layers, dtype=np.int64)
        self._bytes_demanded = 0

    def close(self) -> None:
        """Give up slots, staging buffers and prefetcher; no expert can be fetched then."""
        self._slots, self._slot_rows, self._views, self.prefetcher = [], [], [], None
        self._staging, self._group_staging = self._staging.new_empty(0), None

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

    @property
    def bytes_moved(self) -> int:
        """Bytes that crossed the link since the start, wasted ones included."""
        return self._bytes_demanded + (self.prefetcher.n_bytes if self.prefetcher else 0)

    def n_experts(self, layer: int) -> int:
        """E, the number of experts of a layer."""
        return self._store.n_experts(layer)

    def fetch_experts(
        self, layer: int, experts: Collection[int], hidden: torch.Tensor
    ) -> Iterator[tuple[int, Weights]]:
        """Yield the resident experts, then those prefetched, then the others as they arrive.

        Every copy that has room is issued at once; experts without a slot stream through the
        staging buffers, one loading while the other is read. A slot counts as holding an expert
        only after its copy was waited for: whatever stops the iteration in between leaves slots
        free, never wrong.
        """
        with self._deciding(layer, experts, hidden, self._staging) as step:
            for arrived in self._as_they_come(step, hidden, n_groups=len(step.loads)):
                for expert in arrived:
                    yield expert, self._weights(step, expert)

    @contextmanager
    def fetching(
        self, layer: int, experts: Collection[int], hidden: torch.Tensor
    ) -> Iterator[GroupedFetch]:
        """Decide a step whose experts are read in groups; they come as by `fetch_experts`.

        Those that get a slot are waited for in a few groups, and so are the others where experts
        are small. Nothing is copied before the first group is asked for.
        """
        with self._deciding(layer, experts, hidden, self._staging_of_groups()) as step:
            order = [*step.hits, *step.begun, *step.demanded_loads, *step.streamed]
            arrivals = self._as_they_come(step, hidden, N_LOAD_GROUPS)
            yield GroupedFetch(order, self._addresses(step, order), arrivals)

    def _staging_of_groups(self) -> torch.Tensor:
        """Return staging buffers for groups of experts, allocated when they are first needed.

        They are beyond what was planned: where there is no room, experts come one at a time.
        """
        if self._group_staging is None:
            width = self._staging.shape[1]
            room = STAGING_SHARE * sum(pool.numel() for pool in self._slots)
            n_at_once = min(MOST_STREAMED, int(room / max(1, N_STAGING * width)))
            is_larger = width > 0 and n_at_once > 1
            shape = (N_STAGING * n_at_once, width)
            try:
                with torch.inference_mode(False):  # later passes may be of another mode
                    larger = self._staging.new_empty(shape) if is_larger else self._staging
            except torch.OutOfMemoryError:
                larger = self._staging
            self._group_staging = larger
        return self._group_staging

    @contextmanager
    def _deciding(
        self, layer: int, experts: Collection[int], hidden: torch.Tensor, staging: torch.Tensor
    ) -> Iterator[LayerStep]:
        """Decide a step and take its victims out; prefetches of the layer end with it."""
        plan = self.cache.plan_step(layer, experts, self._scores(layer, hidden))
        loads = {load.expert: load for load in plan.loads}
        missing = [*loads, *plan.streamed]
        begun = self.prefetcher.resolve(layer, missing) if self.prefetcher else {}
        beside = {e: copy.destination for e, copy in begun.items() if e not in loads}
        late = [expert for expert in plan.streamed if expert not in begun]
        if late:
            beside |= zip(late, cycle(staging), strict=False)
        self.cache.vacate(plan)
        try:
            yield LayerStep(layer, plan, begun, loads, beside, len(staging) // N_STAGING)
        finally:
            if self.prefetcher:
                self.prefetcher.release(layer)

    def _as_they_come(
        self, step: LayerStep, hidden: torch.Tensor, n_groups: int
    ) -> Iterator[Sequence[int]]:
        """Ask for all that is missing, then yield the experts of a step as they can be read."""
        layer, loads, streamed = step.layer, step.demanded_loads, step.streamed_groups
        for copy in step.begun.values():
            self._link.finish(copy)
        slots = {expert: self._slot_of(step.loads[expert]) for expert in loads}
        loading = [(group, self._copy(layer, group, slots)) for group in in_groups(loads, n_groups)]
        staged = [self._copy(layer, group, step.beside) for group in streamed[:N_STAGING]]
        late = [expert for group in streamed[N_STAGING:] for expert in group]
        self.hits[layer] += len(step.hits)
        self.misses[layer] += len(loads) + len(step.streamed)
        if self.prefetcher:
            self.prefetcher.on_experts_input(layer, hidden, self.cache, step.plan, late)
        if step.hits:
            yield step.hits
        for expert, copy in step.begun.items():
            self._link.wait(copy.arrival)
            if expert in step.loads:
                buffer = copy.destination
                self._slot_of(step.loads[expert])[: buffer.numel()].copy_(buffer)
                self._occupy(step.loads[expert])
            yield [expert]
        for group, arrival in loading:
            self._link.wait(arrival)
            for expert in group:
                self._occupy(step.loads[expert])
            yield group
        for position, group in enumerate(streamed):
            self._link.wait(staged[position])
            yield group
            if position + N_STAGING < len(streamed):
                staged.append(self._copy(layer, streamed[position + N_STAGING], step.beside))

    def _weights(self, step: LayerStep, expert: int) -> Weights:
        """Return the weights of an expert that has arrived, where it lies."""
        layer = step.layer
        if expert in step.beside:
            return self._store.views(layer, expert, step.beside[expert])
        views = self._views[layer]
        if expert not in views:
            slot = self._slot_rows[self._pool(layer)][self.cache.slot_of[layer, expert]]
            views[expert] = self._store.views(layer, expert, slot)
        return views[expert]

    def _addresses(self, step: LayerStep, experts: Sequence[int]) -> list[int]:
        """Return where each expert of a step lies once it has arrived."""
        slots = self._slots[self._pool(step.layer)]
        begin, width = slots.data_ptr(), slots.shape[1]
        resident = (begin + self.cache.slot_of[step.layer, list(step.hits)] * width).tolist()
        return resident + [
            begin + step.loads[expert].slot * width
            if expert in step.loads
            else step.beside[expert].data_ptr()
            for expert in experts[len(resident) :]
        ]

    def _pool_widths(self, plan: CachePlan) -> list[int]:
        """Return the bytes of a slot of each pool."""
        widths = [self._store.slot_bytes(layer) for layer in range(self._store.n_layers)]
        return [max(widths)] if plan.is_global else widths

    def _pool(self, layer: int) -> int:
        return 0 if self.plan.is_global else layer

    def _slot_of(self, load: Load) -> torch.Tensor:
        return self._slot_rows[self._pool(load.layer)][load.slot]

    def _scores(self, layer: int, hidden: torch.Tensor) -> NDArray[np.float32] | None:
        if self._routers is None:
            return None
        return router_scores(self._routers[layer], hidden.detach()).cpu().numpy()

    def _occupy(self, load: Load) -> None:
        self._views[load.layer].pop(load.expert, None)  # it may have lain in another slot
        self.cache.occupy(load)

    def _copy(
        self, layer: int, experts: Sequence[int], targets: Mapping[int, torch.Tensor]
    ) -> object:
        """Begin to copy experts to their buffers; return what to wait for all of them by."""
        copies = (self._copied(layer, expert, targets[expert]) for expert in experts)
        return self._link.copy(*next(copies)) if len(experts) == 1 else self._link.copy_all(copies)

    def _copied(
        self, layer: int, expert: int, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return source and destination of an expert that is copied now."""
        buffer = self._store.buffer(layer, expert)
        self._bytes_demanded += buffer.numel()
        return buffer, target[: buffer.numel()]
