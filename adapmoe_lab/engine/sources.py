"""Where the engine takes an expert's weights from: a device cache, or the store itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

import numpy as np
import torch

from adapmoe_lab.engine.link import Link
from adapmoe_lab.engine.store import ExpertStore
from adapmoe_lab.models.experts import Weights
from adapmoe_lab.policies.allocation import N_STAGING
from adapmoe_lab.policies.eviction import POLICIES
from adapmoe_lab.policies.residency import LayerCache, StepPlan


class ExpertSource(Protocol):
    """Hands out the weights of the experts that one layer needs in one forward pass."""

    def arrivals(self, layer: int, experts: Collection[int]) -> Iterator[tuple[int, Weights]]:
        """Yield each expert once, with weights valid until the next one is asked for."""
        ...


class StoredExperts:
    """Experts read straight from the store, for work in which residency plays no part."""

    def __init__(self, store: ExpertStore, device: torch.device) -> None:
        """Read from `store`, to tensors on `device`."""
        self._store = store
        self._device = device

    def arrivals(self, layer: int, experts: Collection[int]) -> Iterator[tuple[int, Weights]]:
        """Yield experts in ascending order; on the CPU without a copy."""
        for expert in sorted(experts):
            row = self._store.row(layer, expert).to(self._device)
            yield expert, self._store.views(layer, expert, row)


class CachedExperts:
    """Experts served from slots on the device and loaded over a link on a miss.

    Counters hold distinct experts per layer since the start; misses include streamed experts.
    """

    def __init__(
        self,
        store: ExpertStore,
        link: Link,
        device: torch.device,
        slots: Collection[int],
        eviction: str = "lru",
    ) -> None:
        """Allocate the slots [L] and the staging rows; every slot starts empty."""
        self._store = store
        self._link = link
        self.caches = [LayerCache(int(n), POLICIES[eviction]()) for n in slots]
        widths = [store.slot_bytes(layer) for layer in range(store.n_layers)]
        self._slots = [
            torch.empty((cache.n_slots, width), dtype=torch.uint8, device=device)
            for cache, width in zip(self.caches, widths, strict=True)
        ]
        self._views: list[dict[int, Weights]] = [{} for _ in self.caches]
        streams = any(
            cache.n_slots < store.n_experts(layer) for layer, cache in enumerate(self.caches)
        )
        shape = (N_STAGING, max(widths) if streams else 0)
        self._staging = torch.empty(shape, dtype=torch.uint8, device=device)
        self.hits = np.zeros(store.n_layers, dtype=np.int64)
        self.misses = np.zeros(store.n_layers, dtype=np.int64)
        self.bytes_moved = 0
        self._expert_bytes = store.expert_bytes

    def arrivals(self, layer: int, experts: Collection[int]) -> Iterator[tuple[int, Weights]]:
        """Yield the resident experts first, then the missing ones as they arrive.

        Every copy that has room is asked for at once; experts without a slot stream through the
        staging rows, one loading while the other is read. A slot counts as holding an expert
        only after its copy was waited for: whatever stops the iteration in between leaves slots
        free, never wrong.
        """
        cache = self.caches[layer]
        plan = cache.plan(experts)
        cache.vacate(plan)
        loading = [
            (load, self._copy(layer, load.expert, self._slots[layer][load.slot]))
            for load in plan.loads
        ]
        rows = list(self._staging)
        staged = [
            self._copy(layer, expert, row) for expert, row in zip(plan.streamed, rows, strict=False)
        ]
        self._count(layer, plan)
        for expert in plan.hits:
            yield expert, self._views[layer][expert]
        for load, arrival in loading:
            self._link.wait(arrival)
            row = self._slots[layer][load.slot]
            self._views[layer][load.expert] = self._store.views(layer, load.expert, row)
            cache.occupy(load)
            yield load.expert, self._views[layer][load.expert]
        for position, expert in enumerate(plan.streamed):
            row = rows[position % N_STAGING]
            self._link.wait(staged[position])
            yield expert, self._store.views(layer, expert, row)
            if position + N_STAGING < len(plan.streamed):
                following = plan.streamed[position + N_STAGING]
                staged.append(self._copy(layer, following, row))

    def _copy(self, layer: int, expert: int, target: torch.Tensor) -> object:
        row = self._store.row(layer, expert)
        return self._link.copy(row, target[: row.numel()])

    def _count(self, layer: int, plan: StepPlan) -> None:
        self.hits[layer] += len(plan.hits)
        self.misses[layer] += plan.n_misses
        missed = [*(load.expert for load in plan.loads), *plan.streamed]
        self.bytes_moved += int(self._expert_bytes[layer, missed].sum())
