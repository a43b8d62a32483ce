"""Where the engine takes an expert's weights from: a device cache, or the store itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

import numpy as np
import torch

from adapmoe_lab.engine.link import Link
from adapmoe_lab.engine.store import ExpertStore, Views
from adapmoe_lab.policies.allocation import N_STAGING
from adapmoe_lab.policies.eviction import POLICIES
from adapmoe_lab.policies.residency import LayerCache, Load, StepPlan


class ExpertSource(Protocol):
    """Hands out the weights of the experts that one layer needs in one forward pass."""

    def arrivals(self, layer: int, experts: Collection[int]) -> Iterator[tuple[int, Views]]:
        """Yield each expert once, with weights valid until the next one is asked for."""
        ...


class StoredExperts:
    """Experts read straight from the store, for work in which residency plays no part."""

    def __init__(self, store: ExpertStore, device: torch.device) -> None:
        """Read from `store`, to tensors on `device`."""
        self._store = store
        self._device = device

    def arrivals(self, layer: int, experts: Collection[int]) -> Iterator[tuple[int, Views]]:
        """Yield experts in ascending order; on the CPU without a copy."""
        for expert in sorted(experts):
            row = self._store.slab(layer)[expert].to(self._device)
            yield expert, self._store.views(layer, row)


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
        rows = [store.slab(layer) for layer in range(store.n_layers)]
        self._slots = [
            torch.empty((cache.n_slots, row.shape[1]), dtype=row.dtype, device=device)
            for cache, row in zip(self.caches, rows, strict=True)
        ]
        self._slot_views = [
            [store.views(layer, row) for row in rows] for layer, rows in enumerate(self._slots)
        ]
        streams = any(
            cache.n_slots < len(row) for cache, row in zip(self.caches, rows, strict=True)
        )
        width = max(row.shape[1] for row in rows) if streams else 0
        self._staging = torch.empty((N_STAGING, width), dtype=rows[0].dtype, device=device)
        self.hits = np.zeros(store.n_layers, dtype=np.int64)
        self.misses = np.zeros(store.n_layers, dtype=np.int64)
        self.bytes_moved = 0

    def arrivals(self, layer: int, experts: Collection[int]) -> Iterator[tuple[int, Views]]:
        """Yield the resident experts first, then the missing ones as they arrive.

        Every copy that has room is asked for at once; experts without a slot stream through the
        staging rows, one loading while the other is read. A slot counts as holding an expert
        only after its copy was waited for: whatever stops the iteration in between leaves slots
        free, never wrong.
        """
        cache = self.caches[layer]
        plan = cache.plan(experts)
        cache.vacate(plan)
        loading = [(load, self._copy_to_slot(layer, load)) for load in plan.loads]
        rows = [self._staging[i, : self._slots[layer].shape[1]] for i in range(N_STAGING)]
        slab = self._store.slab(layer)
        staged = [
            self._link.copy(slab[expert], row)
            for expert, row in zip(plan.streamed, rows, strict=False)
        ]
        self._count(layer, plan)
        for expert in plan.hits:
            yield expert, self._slot_views[layer][cache.slot_of[expert]]
        for load, arrival in loading:
            self._link.wait(arrival)
            cache.occupy(load)
            yield load.expert, self._slot_views[layer][load.slot]
        for position, expert in enumerate(plan.streamed):
            row = rows[position % N_STAGING]
            self._link.wait(staged[position])
            yield expert, self._store.views(layer, row)
            if position + N_STAGING < len(plan.streamed):
                next_expert = plan.streamed[position + N_STAGING]
                staged.append(self._link.copy(slab[next_expert], row))

    def _copy_to_slot(self, layer: int, load: Load) -> object:
        row = self._store.slab(layer)[load.expert]
        return self._link.copy(row, self._slots[layer][load.slot])

    def _count(self, layer: int, plan: StepPlan) -> None:
        slab = self._store.slab(layer)
        self.hits[layer] += len(plan.hits)
        self.misses[layer] += plan.n_misses
        self.bytes_moved += plan.n_misses * slab.shape[1] * slab.element_size()
