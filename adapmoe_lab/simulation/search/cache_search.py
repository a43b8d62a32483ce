"""Which division of slots, and which eviction, load least: judged by replaying a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.allocation.slots import plan_slots, shared
from adapmoe_lab.policies.eviction.registry import policy_named
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.records import CachePlan, GatingTable, RoutingTrace
from adapmoe_lab.simulation.replay.miss_curves import miss_curves
from adapmoe_lab.simulation.replay.replay import replay
from adapmoe_lab.simulation.statistics.predictability import recall_and_precision

EVICTIONS = ("lru", "lfu_aged", "router_average")
"""Tried by `best_cache` if it is told nothing else, the plainest first."""
DIVISIONS = ("uniform", "measured")


@dataclass(frozen=True, eq=False)
class CacheChoice:
    """A division of slots with an eviction, and what it loads.

    Attributes:
        division: name of the division.
        plan: the slots.
        eviction: name of the policy.
        loads_per_token: experts loaded per token, all layers together.
    """

    division: str
    plan: CachePlan
    eviction: str
    loads_per_token: float


def slot_divisions(
    trace: RoutingTrace, uniform: CachePlan, gating: GatingTable | None = None
) -> dict[str, CachePlan]:
    """Return the ways to divide as many slots as a plan has, by name.

    `uniform` is the plan itself; `measured` follows the trace's miss curves; `shared` is one pool
    for all layers; `adapmoe` is the paper's program (arXiv 2408.10284, section 4.3), for top-2
    routers, with the share of tokens run with one expert and the accuracy of prediction from the
    trace. The slots of all layers must be of one size.
    """
    spec, n_slots = trace.spec, uniform.n_slots
    curves = miss_curves(trace, gating)
    divided = {"measured": plan_slots(n_slots, miss_curves=curves, method="measured")}
    if spec.top_k == 2:
        n_kept = kept_experts(trace, gating).sum(axis=2)
        divided["adapmoe"] = plan_slots(
            n_slots,
            n_experts=spec.n_experts,
            single_expert_ratio=(n_kept == 1).mean(axis=0),
            prefetch_accuracy=_share_predicted(trace),
            method="adapmoe",
        )
    plans = {
        name: replace(
            uniform, slots=plan.slots, method=plan.method, expected_loads=plan.expected_loads
        )
        for name, plan in divided.items()
    }
    return {"uniform": uniform, **plans, "shared": shared(uniform)}


def _share_predicted(trace: RoutingTrace) -> NDArray[np.float64] | None:
    """Return the share of each layer's experts that the layer before predicts, float64 [L]."""
    if 1 not in trace.predictions.get("next_router", {}):
        return None
    return np.nan_to_num(recall_and_precision(trace, "next_router", 1).recall)


def cache_choices(
    trace: RoutingTrace,
    plans: Mapping[str, CachePlan],
    evictions: Sequence[str] = EVICTIONS,
    gating: GatingTable | None = None,
    *,
    first_counted: int = 0,
) -> list[CacheChoice]:
    """Replay every plan under every eviction, tokens before `first_counted` only filling it."""
    steps = trace.as_decode()
    keep = kept_experts(steps, gating)
    n_counted = trace.n_tokens - first_counted
    return [
        CacheChoice(name, plan, eviction, float(misses[first_counted:].sum()) / n_counted)
        for name, plan in plans.items()
        for eviction in evictions
        for misses in [replay(steps, keep, plan, eviction).misses]
    ]


def best_cache(
    trace: RoutingTrace,
    uniform: CachePlan,
    gating: GatingTable | None = None,
    evictions: Sequence[str] | None = None,
) -> tuple[CacheChoice, list[CacheChoice]]:
    """Return what loads least for the slots of a plan, and all that was tried.

    Miss curves are measured on the first half of the trace and everything is judged on the second,
    so that a division is not praised for what it was made from. What is chosen is then divided
    anew by the whole trace.

    Args:
        trace: recorded routing.
        uniform: as many slots in every layer.
        gating: what will skip experts.
        evictions: names of policies to try; of equal loads the first is taken. None for
            `EVICTIONS`, without those that read scores which the trace does not hold.

    Raises:
        ValueError: there is no such policy, or it can only be simulated.
    """
    if evictions is None:
        has_scores = trace.router_probs is not None
        evictions = [
            name for name in EVICTIONS if has_scores or not policy_named(name).needs_scores
        ]
    for eviction in evictions:
        policy_named(eviction).check_runnable()
    half = trace.n_tokens // 2
    divided = slot_divisions(trace.first(max(1, half)), uniform, gating)
    plans = {name: divided[name] for name in DIVISIONS}
    tried = cache_choices(trace, plans, evictions, gating, first_counted=half)
    best = min(tried, key=lambda choice: choice.loads_per_token)
    if best.division == "measured":
        best = replace(best, plan=slot_divisions(trace, uniform, gating)["measured"])
    return best, tried


def gap_closed(loads: float, baseline: float, belady: float) -> float:
    """Return the share of the way from a baseline to Belady's loads; NaN if there is no way."""
    return (baseline - loads) / (baseline - belady) if baseline > belady else float(np.nan)
