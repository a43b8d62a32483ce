"""The executor that the host drives layer by layer: any policy, any precision, any device."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from adapmoe_lab.engine.device import on_host
from adapmoe_lab.engine.executor import Capabilities
from adapmoe_lab.engine.host_driven.combine import LayerRun, StreamedCombine
from adapmoe_lab.engine.host_driven.decoder import TransformersDecoder
from adapmoe_lab.engine.host_driven.expert_sources import CachedExperts, ExpertSource, StoredExperts
from adapmoe_lab.engine.host_driven.grouped import GroupedProducts
from adapmoe_lab.engine.host_driven.observers import Observers
from adapmoe_lab.engine.host_driven.skipping import Skipping
from adapmoe_lab.engine.host_driven.surrogates import SurrogateOutputs
from adapmoe_lab.engine.layer_pass import LayerPass
from adapmoe_lab.engine.prefetch.predictors import Predictor
from adapmoe_lab.engine.prefetch.prefetcher import Prefetcher
from adapmoe_lab.engine.store.expert_store import ExpertStore
from adapmoe_lab.engine.transfer.clock import Clock
from adapmoe_lab.engine.transfer.link import Link
from adapmoe_lab.models.experts import Weights
from adapmoe_lab.models.families import Router
from adapmoe_lab.models.hooks.observing import Callback
from adapmoe_lab.records import CachePlan, GatingTable, PrefetchTable, Surrogates, Traffic
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.step_costs import StepCosts


class HostDrivenExecutor:
    """Runs a model's experts from a store through a cache on the device; an `Executor`.

    Attributes:
        device: where it computes.
        clock: what time is read from.
        step_costs: what the parts of a step are expected to take, and do on a virtual clock.
        is_closed: whether everything was given up.
        why_not_replayed: why no captured graph runs in its place, if one was asked for.
    """

    capabilities = Capabilities("host")
    runs_steps_by = "host"

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

        `dtype` is the precision the model computes in. The routers, one per layer, are needed by
        eviction policies that read scores.
        """
        self._store = store
        self._link = link
        self.clock = clock
        self.device = device
        self._dtype = dtype
        self.step_costs = StepCosts()
        self._skipping = Skipping()
        self._observers = Observers()
        self.is_closed = False
        self.why_not_replayed: str | None = None
        self._n_sequences = 1
        self._routers = routers
        self._direct = StoredExperts(store, device)
        self._grouped = GroupedProducts(store, device, clock)
        self._prefetcher_of = partial(Prefetcher, store=store, link=link, clock=clock)
        self.release()

    def configure(
        self,
        gating: GatingTable | None,
        plan: CachePlan,
        eviction: str = "lru",
        surrogates: Surrogates | None = None,
        prefetch: PrefetchTable | None = None,
        predictors: Sequence[Predictor] = (),
        step_costs: StepCosts | None = None,
    ) -> None:
        """Start afresh with an empty cache of the planned slots; see `Executor`.

        Surrogates that are already on the device stay there. The old slots are freed before
        anything new is allocated; if there is no room for that, the executor is left without slots
        and under its old gating.
        """
        self.check_open()
        self.release()
        costs = step_costs if step_costs is not None else self.step_costs
        skipping = Skipping(gating, self._on_device(surrogates))
        prefetcher = None
        if prefetch is not None:
            prefetcher = self._prefetcher_of(
                prefetch, predictors, device=self.device, step_costs=costs, gating=gating
            )
        self._use(
            CachedExperts(
                self._store, self._link, self.device, plan, eviction, self._routers, prefetcher
            )
        )
        self._skipping, self.step_costs = skipping, costs

    def idle_prefetcher(
        self, table: PrefetchTable, predictors: Sequence[Predictor], gating: GatingTable | None
    ) -> Prefetcher:
        """Return what queries the predictors of a table that nothing is fetched by, for timing.

        Its buffer is on the host; `gating` is what candidates are put to.
        """
        host = torch.device("cpu")
        return self._prefetcher_of(
            table, predictors, device=host, step_costs=self.step_costs, gating=gating
        )

    def release(self) -> None:
        """Give up all slots, once nothing is on its way into them; experts then only stream."""
        self._link.drain()
        none = CachePlan(np.zeros(self._store.n_layers), None, None, "none")
        self._use(CachedExperts(self._store, self._link, self.device, none))

    def close(self) -> None:
        """Give up the cache, surrogates and the store: nothing runs afterwards."""
        self._link.drain()
        self._cached.close()
        self._skipping = Skipping()
        self.is_closed = True
        self._store.close()

    def check_open(self) -> None:
        """Raise RuntimeError if it was closed."""
        if self.is_closed:
            raise RuntimeError("This model is closed, its experts are freed; load it again.")

    def _on_device(self, surrogates: Surrogates | None) -> SurrogateOutputs | None:
        if surrogates is None:
            return None
        present = self._skipping.outputs
        if present is not None and present.surrogates is surrogates:
            return present
        return SurrogateOutputs(surrogates, self.device, self._dtype)

    @property
    def skipping(self) -> str:
        """Identify what is skipped and what is computed instead; `UNGATED` if nothing is."""
        return self._skipping.fingerprint()

    def _use(self, cached: CachedExperts) -> None:
        self._cached = cached
        self._source: ExpertSource = cached
        self._n_steps = self._kept = self._skipped = 0

    @property
    def traffic(self) -> Traffic:
        """Counters since the cache was made."""
        return self._cached.traffic(self._n_steps, self._kept, self._skipped)

    @property
    def plan(self) -> CachePlan:
        """The slots in use."""
        return self._cached.plan

    @property
    def cached_experts(self) -> CachedExperts:
        """The slots and who is resident, for an executor that runs steps in them by itself."""
        return self._cached

    @property
    def gating(self) -> GatingTable | None:
        """The gating in force."""
        return self._skipping.gating

    @property
    def surrogates(self) -> Surrogates | None:
        """What is computed in a skipped expert's place."""
        outputs = self.surrogate_outputs
        return outputs.surrogates if outputs is not None else None

    @property
    def surrogate_outputs(self) -> SurrogateOutputs | None:
        """The surrogates on the device, for an executor that runs steps by itself."""
        return self._skipping.outputs

    def decoder(self, hf: nn.Module) -> TransformersDecoder:
        """Return what decodes one sequence with the model whose experts this runs."""
        return TransformersDecoder(hf)

    def switch_to(self, gating: GatingTable | None, prefetcher: Prefetcher | None) -> None:
        """Go on under another gating and prefetcher; slots and counters stay as they are."""
        self._skipping = replace(self._skipping, gating=gating)
        self._cached.prefetcher = prefetcher

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
        """Run everything straight from the store, whatever is configured, and count none of it."""
        kept = ("_skipping", "_observers", "_n_steps", "_kept", "_skipped")
        before = {name: getattr(self, name) for name in kept}
        self._skipping, self._observers = Skipping(), Observers()
        try:
            with self.reading_store():
                yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    @contextmanager
    def gated_by(self, table: GatingTable | None) -> Iterator[None]:
        """Skip by another table for a while; cache and counters go on."""
        previous, self._skipping = self._skipping, replace(self._skipping, gating=table)
        try:
            yield
        finally:
            self._skipping = previous

    @contextmanager
    def observing(self, callbacks: Mapping[HookPoint, Callback]) -> Iterator[None]:
        """Call back at the hook points that lie inside a layer's experts, see `OF_EXPERTS`."""
        with self._observers.adding(callbacks):
            yield

    @property
    def callbacks(self) -> Mapping[HookPoint, Callback]:
        """What it wants to be shown of every forward pass: beginning, end, and maybe layers."""
        wanted: dict[HookPoint, Callback] = {
            HookPoint.TOKEN: self.begin_pass,
            HookPoint.LAST_HIDDEN: self.end_pass,
        }
        prefetcher = self._cached.prefetcher
        if prefetcher is not None and prefetcher.table.predicts_at(HookPoint.LAYER_OUTPUT):
            wanted[HookPoint.LAYER_OUTPUT] = self.end_layer
        return wanted

    def begin_pass(self, token_ids: torch.Tensor, _: object = None) -> None:
        """Prefetch by the tokens [B, T] of a forward pass that begins."""
        self._n_sequences = len(token_ids)
        if self._prefetcher is not None:
            self._prefetcher.begin_pass(token_ids.flatten(), self._cached.cache)

    def end_layer(self, layer: int, output: torch.Tensor) -> None:
        """Prefetch by the output [T, D] of a layer."""
        if self._prefetcher is not None:
            self._prefetcher.on_layer_output(layer, output, self._cached.cache)

    def end_pass(self, last_hidden: torch.Tensor) -> None:
        """Prefetch by the last hidden states [T, D]; on a virtual clock the rest takes time.

        Not of several sequences: what follows each is not known to follow at once.
        """
        if self._source is not self._cached:
            return
        if self._prefetcher is not None and self._n_sequences == 1:
            self._prefetcher.end_pass(last_hidden[-1:], self._cached.cache)
        self.clock.spend(self.step_costs.host.head_s)

    @property
    def _prefetcher(self) -> Prefetcher | None:
        """What prefetches now; nothing does while the store is read or gradients are kept."""
        is_cached = self._source is self._cached and not torch.is_grad_enabled()
        return self._cached.prefetcher if is_cached else None

    def fetch_experts(
        self, layer: int, experts: Collection[int], hidden: torch.Tensor
    ) -> Iterator[tuple[int, Weights]]:
        """Yield each expert from wherever it comes; on a virtual clock, running it takes time.

        So the executor is an `ExpertSource` itself.
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
            RuntimeError: the executor was closed.
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
        self, layer: int, experts: nn.Module, hidden: torch.Tensor, *chosen: torch.Tensor
    ) -> torch.Tensor:
        top_k_index, top_k_weights = chosen
        self.clock.spend(self.step_costs.host.dense_layer_s)
        # on a GPU this is the layer's one synchronisation
        indices, weights = routing = on_host([top_k_index, top_k_weights.float()])
        n_experts = self._store.n_experts(layer)
        keep, top_k_weights = self._skipping.kept(layer, routing, top_k_weights, n_experts)
        run = LayerRun(layer, experts, indices, keep, self._skipping.outputs)
        if torch.is_grad_enabled() and (hidden.requires_grad or top_k_weights.requires_grad):
            observers = self._observers.at(HookPoint.EXPERTS_GRADIENT)
            output, parts = StreamedCombine.apply(
                hidden, top_k_weights, run, self, self._direct, observers
            )
        else:
            parts = self._contributions(run, hidden, top_k_weights)
            output = parts.sum(dim=1)
        self._n_steps += layer == 0
        self._kept += int(keep.sum())
        self._skipped += int(keep.size - keep.sum())
        output = self._skipping.completed(layer, hidden, output, routing, keep).to(hidden.dtype)
        if callbacks := self._observers.at(HookPoint.EXPERTS_OUTPUT):
            passed = LayerPass(layer, hidden, indices, weights, keep, parts, output)
            for callback in callbacks:
                callback(passed)
        return output

    def _contributions(
        self, run: LayerRun, hidden: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted expert outputs [T, K, D]; of many tokens in groups, if possible."""
        if self._source is self._cached and self._grouped.serves(run, hidden):
            return self._grouped.contributions(run, self._cached, hidden, weights)
        return run.contributions(self, hidden, weights)
