"""Prefetch: experts that later layers will probably need, brought in the link's idle time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.device import on_host
from adapmoe_lab.engine.prefetch.predictors import Predictor, likeliest
from adapmoe_lab.engine.store.expert_store import ExpertStore
from adapmoe_lab.engine.transfer.clock import Clock
from adapmoe_lab.engine.transfer.link import Link
from adapmoe_lab.engine.transfer.prefetch_copy import PrefetchCopy
from adapmoe_lab.policies.eviction.expert_cache import ExpertCache, StepPlan
from adapmoe_lab.policies.prefetch.candidates import likely_needed
from adapmoe_lab.policies.prefetch.expected_gain import expected_gain_s, needed_at, priority
from adapmoe_lab.records import GatingTable, PrefetchSource, PrefetchTable
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.step_costs import StepCosts, chunk_bounds


@dataclass(eq=False)
class _Entry:
    """An expert in the buffer, or on its way there."""

    layer: int
    expert: int
    copy: PrefetchCopy


@dataclass(frozen=True)
class _Outlook:
    """When a prefetch that is issued now can begin, and when its expert will be needed.

    Both are taken before the predictors are queried, which delays them alike.

    Attributes:
        begins_at: when the link will be done with what is demanded; now, if it is.
        ready_at: when the present layer will be done.
        layer_experts_s: seconds that the experts of a layer take.
        late_s: seconds that the link will take for what the layer has yet to demand.
    """

    begins_at: float
    ready_at: float
    layer_experts_s: float = 0.0
    late_s: float = 0.0


class Prefetcher:
    """Follows a prefetch table: what it prefetches waits in a buffer beside the cache.

    Attributes:
        table: the predictors that are queried, and how far each is trusted.
        step_costs: what a forward pass is expected to take.
        used: int64 [L], prefetches begun whose experts were needed.
        wasted: int64 [L], prefetches begun whose experts were not.
    """

    def __init__(
        self,
        table: PrefetchTable,
        predictors: Sequence[Predictor],
        store: ExpertStore,
        link: Link,
        clock: Clock,
        device: torch.device,
        step_costs: StepCosts,
        gating: GatingTable | None = None,
    ) -> None:
        """Allocate the buffer.

        Args:
            table: which predictors to query.
            predictors: at least those of the table.
            store: where the experts lie on the host.
            link: what they cross.
            clock: what time is read from.
            device: where the buffer is.
            step_costs: what a forward pass is expected to take; on a virtual clock, querying takes
                just that.
            gating: what will skip experts: candidates that it would skip are not prefetched.
        """
        self.table = table
        self.step_costs = step_costs
        self._predictors = {predictor.name: predictor for predictor in predictors}
        self._check_predictors()
        self._store = store
        self._link = link
        self._clock = clock
        shape = (table.buffer_slots, int(store.expert_bytes.max()))
        self._buffer = torch.empty(shape, dtype=torch.uint8, device=device)
        self._entries: list[_Entry | None] = [None] * table.buffer_slots
        self.used = np.zeros(store.n_layers, dtype=np.int64)
        self.wasted = np.zeros(store.n_layers, dtype=np.int64)
        self._gating = gating
        self._bytes_resolved, self._n_issued = 0, 0
        load_s = step_costs.load_s
        self._load_s = link.seconds if load_s is None else lru_cache(load_s)

    def _check_predictors(self) -> None:
        missing = {source.predictor for source in self.table.sources} - set(self._predictors)
        if missing:
            raise ValueError(
                f"Prefetch follows {', '.join(sorted(missing))}, which this model does not offer; "
                f"it offers {', '.join(self._predictors) or 'none'}. Fitted predictors come with "
                "the prefetch table."
            )

    @property
    def n_bytes(self) -> int:
        """Bytes of all chunks begun so far."""
        return self._bytes_resolved + sum(
            entry.copy.bytes_begun for entry in self._entries if entry
        )

    def resolve(self, layer: int, missing: Collection[int]) -> dict[int, PrefetchCopy]:
        """Return what was begun of a layer's missing experts, and cancel its other prefetches.

        The copies' entries stay taken until `release`.
        """
        self._link.begin_chunks()
        begun = {}
        for number, entry in self._entries_of(layer):
            if entry.copy.n_begun and entry.expert in missing:
                begun[entry.expert] = entry.copy
                self.used[layer] += 1
            else:
                self.wasted[layer] += entry.copy.n_begun > 0
                self._cancel(number, entry)
        return dict(sorted(begun.items()))

    def release(self, layer: int) -> None:
        """Free the entries of a layer, whose experts were computed or moved."""
        for number, entry in self._entries_of(layer):
            self._cancel(number, entry)

    def begin_pass(self, token_ids: torch.Tensor, cache: ExpertCache) -> None:
        """Prefetch for the first layer, by the tokens [T] of the pass that begins."""
        self._issue_prefetches(HookPoint.TOKEN, 0, token_ids, cache, self._outlook())

    def on_experts_input(
        self,
        layer: int,
        hidden: torch.Tensor,
        cache: ExpertCache,
        step: StepPlan,
        late: Sequence[int],
    ) -> None:
        """Prefetch for later layers, once this layer has demanded all that it misses.

        Args:
            layer: the layer that runs.
            hidden: what its experts are given [T, D].
            cache: which experts are resident.
            step: what the layer does.
            late: experts that it will demand once there is staging for them.
        """
        now, link_ready = self._clock.now(), self._link.free_at()
        missing = [*(load.expert for load in step.loads), *step.streamed]
        late_s, hits_s, missing_s, last_s = 0.0, 0.0, 0.0, 0.0
        for expert in step.hits:
            hits_s += self.step_costs.of_expert(layer, expert)
        for expert in sorted(missing):
            missing_s += self.step_costs.of_expert(layer, expert)
            last_s = max(last_s, self.step_costs.of_expert(layer, expert))
        for expert in late:
            late_s += self._link.seconds(int(self._store.expert_bytes[layer, expert]))
        link_ready += late_s
        ready_at = max(now + hits_s, link_ready) + last_s
        outlook = _Outlook(max(now, link_ready), ready_at, hits_s + missing_s, late_s)
        self._issue_prefetches(HookPoint.EXPERTS_INPUT, layer, hidden, cache, outlook)

    def on_layer_output(self, layer: int, output: torch.Tensor, cache: ExpertCache) -> None:
        """Prefetch by a layer's output [T, D], if any predictor reads it."""
        if self.table.predicts_at(HookPoint.LAYER_OUTPUT):
            self._issue_prefetches(HookPoint.LAYER_OUTPUT, layer, output, cache, self._outlook())

    def end_pass(self, last_hidden: torch.Tensor, cache: ExpertCache) -> None:
        """Prefetch for the next token's first layer, by this token's last hidden state [1, D]."""
        outlook = self._outlook(after_s=self.step_costs.host.head_s)
        self._issue_prefetches(HookPoint.LAST_HIDDEN, 0, last_hidden, cache, outlook)

    def _outlook(self, after_s: float = 0.0) -> _Outlook:
        """Return the outlook when nothing is demanded and the layer is done after some seconds."""
        now = self._clock.now()
        return _Outlook(max(now, self._link.free_at()), now + after_s)

    def _issue_prefetches(
        self,
        hook_point: HookPoint,
        layer: int,
        x: torch.Tensor,
        cache: ExpertCache,
        outlook: _Outlook,
    ) -> None:
        """Query all predictors of a hook point, and issue the prefetches that are worth it."""
        host = self.step_costs.host
        queries = [
            (source, layer + source.distance)
            for source in self.table.sources
            if source.hook_point == hook_point and layer + source.distance < self._store.n_layers
        ]
        found = self._query(hook_point, queries, layer, x) if queries else []
        for (source, target), scores in zip(queries, found, strict=True):
            needed_at_s = needed_at(
                outlook.ready_at,
                max(1, source.distance),
                host.dense_layer_s,
                outlook.layer_experts_s,
            )
            experts, chances = self._candidates(source, target, *scores)
            self._cancel_others(target, experts)
            for expert, chance in zip(experts.tolist(), chances.tolist(), strict=True):
                is_here = cache.slot_of[target, expert] >= 0
                if not is_here and self._gains_time(
                    target, expert, chance, outlook.begins_at, needed_at_s
                ):
                    self._fetch(target, expert)
        self._link.expect_quiet(outlook.ready_at + host.dense_layer_s - outlook.late_s)

    def _query(
        self,
        hook_point: HookPoint,
        queries: Sequence[tuple[PrefetchSource, int]],
        layer: int,
        x: torch.Tensor,
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Query predictors, which takes time of its own; see `_scores`."""
        host, at_output = self.step_costs.host, hook_point == HookPoint.LAYER_OUTPUT
        self._clock.spend(
            host.predict_overhead_s + (host.predict_output_overhead_s if at_output else 0.0)
        )
        self._clock.spend(len(queries) * host.predict_s)
        return self._scores(queries, layer, x)

    def _scores(
        self, queries: Sequence[tuple[PrefetchSource, int]], layer: int, x: torch.Tensor
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Return each query's likeliest experts and their scores, both [T, C], on the host."""
        found = []
        for source, target in queries:
            scores = self._predictors[source.predictor].scores(layer, target, x)
            found += likeliest(scores, len(source.probability[target]))
        together = on_host(found)
        return list(zip(together[::2], together[1::2], strict=True))

    def _candidates(
        self,
        source: PrefetchSource,
        target: int,
        experts: NDArray[np.int64],
        scores: NDArray[np.float32],
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        gating = None if self._gating is None else (self._gating, target)
        return likely_needed(experts, source.probability[target], scores, gating)

    def _cancel_others(self, layer: int, experts: NDArray[np.int64]) -> None:
        """Cancel earlier prefetches for a layer that are not begun and no longer candidates."""
        predicted = set(experts.tolist())
        for number, entry in self._entries_of(layer):
            if not entry.copy.n_begun and entry.expert not in predicted:
                self._cancel(number, entry)

    def _gains_time(
        self, layer: int, expert: int, chance: float, begins_at: float, needed_at_s: float
    ) -> bool:
        """Whether prefetching an absent expert, not on its way yet, is expected to gain time."""
        if any(entry.expert == expert for _, entry in self._entries_of(layer)):
            return False
        for entry in self._entries:
            if entry is not None and entry.layer <= layer and not entry.copy.is_whole:
                begins_at += self._load_s(entry.copy.bytes_left)
        n_bytes = int(self._store.expert_bytes[layer, expert])
        load_s, chunk_s = self._load_s(n_bytes), self._load_s(chunk_bounds(n_bytes)[1])
        return expected_gain_s(chance, begins_at, needed_at_s, load_s, chunk_s) > 0

    def _fetch(self, layer: int, expert: int) -> None:
        """Issue the prefetch of an expert if the buffer has room."""
        if None not in self._entries:
            return
        number, source = self._entries.index(None), self._store.buffer(layer, expert)
        target = self._buffer[number][: source.numel()]
        copy = self._link.issue_prefetch(source, target, priority(layer, self._n_issued))
        self._n_issued += 1
        self._entries[number] = _Entry(layer, expert, copy)

    def _entries_of(self, layer: int) -> list[tuple[int, _Entry]]:
        return [
            (number, entry)
            for number, entry in enumerate(self._entries)
            if entry is not None and entry.layer == layer
        ]

    def _cancel(self, number: int, entry: _Entry) -> None:
        self._link.cancel(entry.copy)
        self._bytes_resolved += entry.copy.bytes_begun
        self._entries[number] = None
