"""Which eviction and division of slots makes the fewest loads on held-out text, without prefetch.

`python benchmarks/residency_loads.py --text FOLDER --out FILE.json`

Routing is recorded on the `valid` files of the folder (layout in data/README.md) under the very
gating that is replayed; cuts, measured curves, pins and what AdapMoE's division asks for come
from the shipped calibration texts. Every token is a decode step of its own, the cache goes on
from text to text, and the texts come in two orders: domain by domain, and one of each in turn.
Intervals are over texts, paired with per-layer LRU and as many slots everywhere.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from held_out import DOMAINS, TEXTS_PER_DOMAIN, held_out_texts
from numpy.typing import NDArray

import adapmoe_lab as lab
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.policies.allocation.slots import slots_plan, with_pins
from adapmoe_lab.policies.eviction.registry import POLICIES
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.policies.gating.uniform import UniformCut
from adapmoe_lab.records import CachePlan, GatingTable, RoutingTrace, TunedConfig
from adapmoe_lab.records.files import save_json
from adapmoe_lab.simulation.replay.replay import replay
from adapmoe_lab.simulation.search.cache_search import gap_closed, slot_divisions

SHARES = (0.25, 0.5, 0.75)
ORDERS = {
    "domain by domain": np.arange(len(DOMAINS) * TEXTS_PER_DOMAIN),
    "domains in turn": np.arange(len(DOMAINS) * TEXTS_PER_DOMAIN)
    .reshape(len(DOMAINS), TEXTS_PER_DOMAIN)
    .T.ravel(),
}
BASELINE = "uniform", "lru"
RAW_SHARE, RAW_POLICIES = 0.5, ("lru", "lfu_aged", "router_average", "belady")
"""Whose loads are kept text by text."""


@dataclass(frozen=True, eq=False)
class Case:
    """Routing recorded under one gating: what plans are made from, and what they are judged by."""

    gating: GatingTable | None
    calibration: RoutingTrace
    held_out: RoutingTrace


def record(model: LabModel, texts: list[str], skipped_fraction: float) -> Iterator[Case]:
    """Yield what is recorded with every expert run, and under one cut for all layers."""
    calibration = lab.calibration_texts()
    for gating in (None, UniformCut(lab.profile(model, calibration)).table(skipped_fraction)):
        with model.running(replace(TunedConfig.untuned(model.spec), gating=gating)):
            yield Case(gating, lab.profile(model, calibration), lab.profile(model, texts))


def plans_of(case: Case, share: float) -> dict[str, CachePlan]:
    """Return every division of a share of all experts' slots."""
    spec = case.calibration.spec
    return slot_divisions(
        case.calibration, slots_plan(spec, round(share * spec.n_experts)), case.gating
    )


def uses_of(case: Case) -> NDArray[np.int64]:
    """Return how often each expert is run on the calibration texts, int64 [L, E]."""
    trace, keep = case.calibration, kept_experts(case.calibration, case.gating)
    return np.stack(
        [
            np.bincount(
                trace.expert_indices[:, layer][keep[:, layer]], minlength=trace.spec.n_experts
            )
            for layer in range(trace.spec.n_layers)
        ]
    )


def in_order(trace: RoutingTrace, order: NDArray[np.int64]) -> tuple[RoutingTrace, NDArray]:
    """Return a trace with its texts in another order, and where each begins."""
    ends = [*trace.sequence_starts[1:], trace.n_tokens]
    pieces = [np.arange(trace.sequence_starts[text], ends[text]) for text in order]
    tokens = np.concatenate(pieces)
    names = ("token_ids", "expert_indices", "weights", "router_probs")
    starts = np.cumsum([0, *map(len, pieces)])[:-1]
    moved = {name: getattr(trace, name)[tokens] for name in names}
    return replace(trace.as_decode(), **moved, predictions={}, sequence_starts=starts), starts


def ratio_and_error(loads: NDArray[np.int64], base: NDArray[np.int64]) -> tuple[float, float]:
    """Return loads over the baseline's, texts together, and its paired standard error."""
    ratio = loads.sum() / base.sum()
    rest = loads - ratio * base
    n = len(base)
    return float(ratio), float(np.sqrt(n / (n - 1) * (rest**2).sum()) / base.sum())


def judge(case: Case, order_name: str, share: float) -> list[dict[str, Any]]:
    """Replay every policy under every plan; return one row each."""
    trace, starts = in_order(case.held_out, ORDERS[order_name])
    keep, uses = kept_experts(trace, case.gating), uses_of(case)
    loads = {}
    for name, plan in plans_of(case, share).items():
        for eviction, policy in POLICIES.items():
            given = with_pins(plan, uses) if policy.pins else plan
            misses = replay(trace, keep, given, eviction).misses.sum(axis=1)
            loads[name, eviction] = np.add.reduceat(misses, starts)
    base = loads[BASELINE]
    rows = []
    for (name, eviction), by_text in loads.items():
        ratio, error = ratio_and_error(by_text, base)
        closed = gap_closed(by_text.sum(), base.sum(), loads[name, "belady"].sum())
        row = {
            "gated": case.gating is not None,
            "skipped_fraction": float(1 - keep.mean()),
            "order": order_name,
            "share_cached": share,
            "slots": name,
            "eviction": eviction,
            "loads_per_token": float(by_text.sum() / trace.n_tokens),
            "ratio": ratio,
            "ratio_se": error,
            "belady_gap_closed": None if np.isnan(closed) else float(closed),
        }
        if share == RAW_SHARE and eviction in RAW_POLICIES:
            row["loads_by_text"] = by_text.tolist()
        rows.append(row)
    return rows


def line_of(row: dict[str, Any]) -> str:
    """Say a row in one line."""
    gap = row["belady_gap_closed"]
    return (
        f"{'gated' if row['gated'] else 'all':5} {row['order']:16} {row['share_cached']:4.0%} "
        f"{row['slots']:9} {row['eviction']:15} {row['loads_per_token']:6.3f} loads/token, "
        f"{row['ratio'] - 1:+6.1%} ± {1.96 * row['ratio_se']:.1%}"
        + ("" if gap is None else f", {gap:5.0%} of the gap to Belady")
    )


def main() -> int:
    """Judge every combination, print a table, write the raw counts; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--skipped-fraction", type=float, default=0.2)
    options = parser.parse_args()
    model = lab.load("demo", dtype="float32", device="cpu", link="none")
    conditions = measurement_conditions(model)
    rows = []
    for case in record(model, held_out_texts(options.text), options.skipped_fraction):
        for order, share in itertools.product(ORDERS, SHARES):
            judged = judge(case, order, share)
            for row in sorted(judged, key=lambda row: row["ratio"]):
                print(line_of(row), flush=True)
            rows += judged
    save_json(options.out, {"conditions": {**conditions, "domains": DOMAINS}, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
