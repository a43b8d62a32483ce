"""Replay of a recorded trace through gating and cache, by the step rules."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.allocation import slots_plan
from adapmoe_lab.policies.eviction import POLICIES
from adapmoe_lab.policies.residency import ExpertCache
from adapmoe_lab.records import CachePlan, RoutingTrace


@dataclass(frozen=True, eq=False)
class Replay:
    """Hits and misses of every step and layer.

    Attributes:
        hits: int64 [N, L], distinct experts resident before the step; N steps.
        loads: int64 [N, L], distinct experts brought into a slot.
        streamed: int64 [N, L], distinct experts that only passed through staging.
        is_decode: bool [N], which steps were decode.
    """

    hits: NDArray[np.int64]
    loads: NDArray[np.int64]
    streamed: NDArray[np.int64]
    is_decode: NDArray[np.bool_]

    @property
    def misses(self) -> NDArray[np.int64]:
        """Distinct experts that crossed the link, int64 [N, L]."""
        return self.loads + self.streamed


def replay(
    trace: RoutingTrace, keep: NDArray[np.bool_], plan: CachePlan | None, eviction: str = "lru"
) -> Replay:
    """Replay a trace whose experts `keep` [T, L, K] are run; the cache starts empty.

    Without a plan every layer has room for all its experts.
    """
    first_tokens = np.flatnonzero(np.diff(trace.step_ids, prepend=trace.step_ids[0] - 1))
    n_steps, n_layers = len(first_tokens), trace.spec.n_layers
    hits, loads, streamed = np.zeros((3, n_steps, n_layers), dtype=np.int64)
    needed = _needed_experts(trace, keep, first_tokens)
    cache = ExpertCache(
        plan or slots_plan(trace.spec, trace.spec.n_experts),
        trace.spec.n_experts,
        POLICIES[eviction],
    )
    for step, first in enumerate(first_tokens):
        tokens = slice(first, first_tokens[step + 1] if step + 1 < n_steps else None)
        for layer in range(n_layers):
            scores = trace.router_probs[tokens, layer]
            plan_of_step = cache.plan_step(layer, needed[layer][step], scores)
            cache.vacate(plan_of_step)
            for load in plan_of_step.loads:
                cache.occupy(load)
            hits[step, layer] = len(plan_of_step.hits)
            loads[step, layer] = len(plan_of_step.loads)
            streamed[step, layer] = len(plan_of_step.streamed)
    return Replay(hits, loads, streamed, trace.is_decode[first_tokens])


def _needed_experts(
    trace: RoutingTrace, keep: NDArray[np.bool_], first_tokens: NDArray[np.int64]
) -> list[list[list[int]]]:
    """Return the distinct experts, ascending, of every layer and step."""
    chosen = np.zeros((trace.n_tokens, trace.spec.n_layers, trace.spec.n_experts), dtype=np.bool_)
    tokens, layers, columns = np.nonzero(keep)
    chosen[tokens, layers, trace.expert_indices[tokens, layers, columns]] = True
    by_step = np.logical_or.reduceat(chosen, first_tokens, axis=0)  # [N, L, E]
    needed: list[list[list[int]]] = []
    for layer in range(trace.spec.n_layers):
        sets: list[list[int]] = [[] for _ in first_tokens]
        for step, expert in zip(*(i.tolist() for i in np.nonzero(by_step[:, layer])), strict=True):
            sets[step].append(expert)
        needed.append(sets)
    return needed
