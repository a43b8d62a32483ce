"""The engine: runs routed experts that live in host memory, under a gating table and a cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import nn

from adapmoe_lab.engine.device import on_host
from adapmoe_lab.engine.host_driven.combine import LayerRun, StreamedCombine
from adapmoe_lab.engine.host_driven.expert_sources import CachedExperts, ExpertSource, StoredExperts
from adapmoe_lab.engine.host_driven.surrogates import SurrogateOutputs
from adapmoe_lab.engine.layer_pass import LayerPass
from adapmoe_lab.engine.prefetch.predictors import Predictor
from adapmoe_lab.engine.prefetch.prefetcher import Prefetcher
from adapmoe_lab.engine.store.expert_store import ExpertStore
from adapmoe_lab.engine.transfer.clock import Clock, StepPace
from adapmoe_lab.engine.transfer.link import Link
from adapmoe_lab.models.experts import Weights
from adapmoe_lab.models.families import Router
from adapmoe_lab.models.hooks.observing import OF_EXPERTS, Callback
from adapmoe_lab.policies.gating.keep import gated_weights, keep_by_cuts
from adapmoe_lab.records import CachePlan, GatingTable, PrefetchTable, Surrogates, Traffic
from adapmoe_lab.records.files import digest
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.routing import UNGATED


class HostDrivenExecutor:
    """Executes a model's experts from a store through a cache on the device.

    Implements `models.hook.ExpertsExecutor`. One forward at a time; an exception or interrupt at
    any point leaves the cache consistent.
    """

    def __init__(
        self,
        store: ExpertStore,
        link: Link,
        clock: Clock,
        device: torch.device,
        dtype: torch.dtype,
        routers: Sequence[Router] = (),
    ) -> None:
        """Serve the experts of `store` on `device` over `link`, without slots and gating.

        `dtype` is the precision the model computes in. The routers, one per layer, are asked for
        scores by eviction policies that read them.
        """
        self.store = store
        self.link = link
        self.clock = clock
        self.device = device
        self.dtype = dtype
        self.step_costs = StepPace()
        self.gating: GatingTable | None = None
        self.compensation: SurrogateOutputs | None = None
        self._callbacks = _no_callbacks()
        self.is_closed = False
        self._n_sequences = 1
        self._routers = routers
        self._direct = StoredExperts(store, device)
        self.release()

    def configure(
        self,
        gating: GatingTable | None,
        plan: CachePlan,
        eviction: str = "lru",
        surrogates: Surrogates | None = None,
        prefetch: PrefetchTable | None = None,
        predictors: Sequence[Predictor] = (),
    ) -> None:
        """Set the gating and start afresh with an empty cache of the planned slots.

        `surrogates` stand in for what the gating drops; those already on the device stay there.
        `prefetch` says what is fetched ahead, and which of the predictors are followed. The old
        slots are freed before anything new is allocated; if there is no room for that, the engine
        is left without slots and under its old gating.
        """
        self.check_open()
        self.release()
        compensation = self._on_device(surrogates)
        prefetcher = None
        if prefetch is not None:
            prefetcher = self.prefetcher(prefetch, predictors, gating)
        self._use(
            CachedExperts(
                self.store, self.link, self.device, plan, eviction, self._routers, prefetcher
            )
        )
        self.gating, self.compensation = gating, compensation

    def prefetcher(
        self,
        table: PrefetchTable,
        predictors: Sequence[Predictor],
        gating: GatingTable | None,
        device: torch.device | None = None,
    ) -> Prefetcher:
        """Return what follows a prefetch table here, its buffer on the engine's device or another.

        `gating` is what will skip experts.
        """
        return Prefetcher(
            table, predictors, self.store, self.link, self.clock, device or self.device,
 self.step_costs,            gating,
        )  # fmt: skip

    def release(self) -> None:
        """Give up all slots, once nothing is on its way into them; experts then only stream."""
        self.link.drain()
        none = CachePlan(np.zeros(self.store.n_layers), None, None, "none")
        self._use(CachedExperts(self.store, self.link, self.device, none))

    def close(self) -> None:
        """Give up the cache, what stands in for experts, and the store: nothing runs afterwards."""
        self.link.drain()
        self.cached.close()
        self.gating = self.compensation = None
        self.is_closed = True
        self.store.close()

    def check_open(self) -> None:
        """Raise RuntimeError if the engine was closed."""
        if self.is_closed:
            raise RuntimeError("This model is closed, its experts are freed; load it again.")

    def _on_device(self, surrogates: Surrogates | None) -> SurrogateOutputs | None:
        if surrogates is None:
            return None
        present = self.compensation
        if present is not None and present.surrogates is surrogates:
            return present
        return SurrogateOutputs(surrogates, self.device, self.dtype)

    @property
    def skipping(self) -> str:
        """Identify what is skipped and what stands in for it; `UNGATED` if nothing is skipped."""
        if self.gating is None:
            return UNGATED
        if self.compensation is None:
            return self.gating.fingerprint()
        return digest(self.gating.fingerprint(), self.compensation.surrogates.fingerprint())

    def _use(self, cached: CachedExperts) -> None:
        self.cached = cached
        self._source: ExpertSource = cached
        self._n_steps = self._kept = self._skipped = 0

    @property
    def traffic(self) -> Traffic:
        """Counters since the cache was made."""
        cached, ahead = self.cached, self.cached.prefetcher
        nothing = np.zeros_like(cached.hits)
        return Traffic(
            hits=cached.hits.copy(),
            misses=cached.misses.copy(),
            n_steps=self._n_steps,
            bytes_moved=cached.bytes_moved,
            kept=self._kept,
            skipped=self._skipped,
            prefetch_used=ahead.used.copy() if ahead else nothing,
            prefetch_wasted=ahead.wasted.copy() if ahead else nothing,
        )

    @contextmanager
    def reading_store(self) -> Iterator[None]:
        """Take experts straight from the store; the cache and its counters stay as they are."""
        previous, self._source = self._source, self._direct
        try:
            yield
        finally:
            self._source = previous

    @contextmanager
    def unconfigured(self) -> Iterator[None]:
        """Run everything straight from the store, whatever is configured, and count and show none.

        What is configured and counted is as before afterwards.
        """
        kept = ("compensation", "_callbacks", "_n_steps", "_kept", "_skipped")
        before = {name: getattr(self, name) for name in kept}
        self.compensation, self._callbacks = None, _no_callbacks()
        try:
            with self.reading_store(), self.gated_by(None):
                yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    @contextmanager
    def gated_by(self, table: GatingTable | None) -> Iterator[None]:
        """Skip by another table for a while; cache and counters go on."""
        previous, self.gating = self.gating, table
        try:
            yield
        finally:
            self.gating = previous

    @contextmanager
    def observing(self, callbacks: Mapping[HookPoint, Callback]) -> Iterator[None]:
        """Call back at the hook points that lie inside a layer's experts, see `OF_EXPERTS`."""
        lists = [(self._callbacks[point], callback) for point, callback in callbacks.items()]
        for registered, callback in lists:
            registered.append(callback)
        try:
            yield
        finally:
            for registered, callback in lists:
                registered.remove(callback)

    def begin_pass(self, token_ids: torch.Tensor) -> None:
        """Fetch ahead by the tokens [B, T] of a forward pass that begins."""
        self._n_sequences = len(token_ids)
        if self._prefetcher is not None:
            self._prefetcher.begin_pass(token_ids.flatten(), self.cached.cache)

    def end_layer(self, layer: int, output: torch.Tensor) -> None:
        """Fetch ahead by the output [T, D] of a layer."""
        if self._prefetcher is not None:
            self._prefetcher.on_layer_output(layer, output, self.cached.cache)

    def end_pass(self, last_hidden: torch.Tensor) -> None:
        """Fetch ahead by the last hidden states [T, D]; on a virtual clock the rest takes time.

        Of several sequences nothing is said: what follows each is not known to follow at once.
        """
        if self._source is not self.cached:
            return
        if self._prefetcher is not None and self._n_sequences == 1:
            self._prefetcher.end_pass(last_hidden[-1:], self.cached.cache)
        self.clock.spend(self.step_costs.head_s)

    @property
    def _prefetcher(self) -> Prefetcher | None:
        """What fetches ahead now; nothing does while the store is read or gradients are kept."""
        is_cached = self._source is self.cached and not torch.is_grad_enabled()
        return self.cached.prefetcher if is_cached else None

    def without_link_delay(self) -> AbstractContextManager[None]:
        """Return a context in which an emulated link holds nothing."""
        return self.link.without_link_delay()

    def fetch_experts(
        self, layer: int, experts: Collection[int], hidden: torch.Tensor
    ) -> Iterator[tuple[int, Weights]]:
        """Yield each expert from wherever it comes; on a virtual clock, running it takes time.

        So the engine is an `ExpertSource` itself.
        """
        for arrival in self._source.fetch_experts(layer, experts, hidden):
            yield arrival
            self.clock.spend(self.step_costs.of_expert(layer, arrival[0]))

    def run_layer(
        self,
        layer: int,
        experts: nn.Module,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return the summed outputs [T, D] of the experts each token keeps.

        Under autocast, which transformers' own grouped experts leave out of account, they too are
        computed in the precision of the module's weights.

        Raises:
            RuntimeError: the engine was closed.
        """
        self.check_open()
        device_type = hidden.device.type
        if not torch.is_autocast_enabled(device_type):
            return self._run_layer(layer, experts, hidden, top_k_index, top_k_weights)
        in_precision = hidden.to(next(experts.parameters()).dtype)
        with torch.autocast(device_type, enabled=False):
            output = self._run_layer(layer, experts, in_precision, top_k_index, top_k_weights)
        return output.to(hidden.dtype)

    def _run_layer(
        self,
        layer: int,
        experts: nn.Module,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        self.clock.spend(self.step_costs.dense_layer_s)
        # on a GPU this is the layer's one synchronisation
        indices, weights = on_host([top_k_index, top_k_weights.float()])
        keep = indices < self.store.n_experts(layer)
        if self.gating is not None:
            keep &= keep_by_cuts(weights, self.gating.cuts[layer], self.gating.quantity)
            if self.gating.renormalise:
                scaled = gated_weights(weights, keep, renormalise=True)
                top_k_weights = torch.from_numpy(scaled).to(top_k_weights)
        run = LayerRun(layer, experts, indices, keep)
        if torch.is_grad_enabled() and (hidden.requires_grad or top_k_weights.requires_grad):
            output, parts = StreamedCombine.apply(
                hidden,
                top_k_weights,
                run,
                self,
                self._direct,
                tuple(self._callbacks[HookPoint.EXPERTS_GRADIENT]),
            )
        else:
            parts = run.contributions(self, hidden, top_k_weights)
            output = parts.sum(dim=1)
        self._n_steps += layer == 0
        self._kept += int(keep.sum())
        self._skipped += int(keep.size - keep.sum())
        if self.compensation is not None:
            routing = indices, weights
            output = self.compensation.complete(layer, hidden, output, routing, keep)
        output = output.to(hidden.dtype)
        if callbacks := self._callbacks[HookPoint.EXPERTS_OUTPUT]:
            passed = LayerPass(layer, hidden, indices, weights, keep, parts, output)
            for callback in callbacks:
                callback(passed)
        return output


def _no_callbacks() -> dict[HookPoint, list[Callback]]:
    return {point: [] for point in OF_EXPERTS}
