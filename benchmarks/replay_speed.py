"""How long a replay takes, by policy, against libcachesim on the same trace.

`python benchmarks/replay_speed.py --out benchmarks/results/replay-speed.json`

The trace is synthetic, of the size asked for: routing that repeats itself as real routing does.
libcachesim replays the same requests, layer by layer, through per-layer LRU caches of as many
experts; it is given the requests as a file of its own format, so that no Python runs in its loop.
Ratios are of processor time, which other work on the machine changes little; libcachesim uses one
core, a replay per layer all of them, one of shared slots one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import libcachesim
import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.allocation.slots import shared, slots_plan, with_pins
from adapmoe_lab.policies.eviction.registry import POLICIES
from adapmoe_lab.records import (
    CachePlan,
    MoESpec,
    PrecisionPlan,
    Prediction,
    PrefetchTable,
    RoutingTrace,
)
from adapmoe_lab.records.files import save_json
from adapmoe_lab.records.step_costs import HostCosts, StepCosts
from adapmoe_lab.simulation.replay.miss_curves import miss_curves
from adapmoe_lab.simulation.replay.recorded_candidates import recorded_candidates
from adapmoe_lab.simulation.replay.replay import replay
from adapmoe_lab.simulation.search.prefetch_search import plan_prefetch
from adapmoe_lab.simulation.timing.timeline import Timeline, run_timeline

SIZES = ((32, 8, 2, 0.05), (48, 128, 8, 1.0))
"""Layers, experts, experts per token, and the seconds a replay may take."""

N_TOKENS = 20_000
RIGHT_SHARE = 0.8
ROUNDS = 5
HASH_POWER = 8
"""Buckets of libcachesim's table, a power of two; it spends its time on clearing its default."""


def synthetic_trace(n_layers: int, n_experts: int, top_k: int, seed: int = 0) -> RoutingTrace:
    """Return routing in which some experts are likelier, and those of the last tokens likelier."""
    rng = np.random.default_rng(seed)
    shape = (n_layers, n_experts)
    lasting, moving = 0.7 * rng.normal(size=shape), rng.normal(size=shape)
    probs = np.empty((N_TOKENS, *shape), dtype=np.float16)
    indices = np.empty((N_TOKENS, n_layers, top_k), dtype=np.int16)
    for token in range(N_TOKENS):
        moving = 0.8 * moving + 0.6 * rng.normal(size=shape)
        scores = np.exp(1.2 * moving + lasting)
        probs[token] = scores / scores.sum(axis=1, keepdims=True)
        indices[token] = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
    spec = MoESpec(
        model_id="synthetic",
        revision=f"seed {seed}",
        family="none",
        n_layers=n_layers,
        n_experts=n_experts,
        top_k=top_k,
        hidden_size=1,
        expert_bytes={"bfloat16": 1},
        precision=PrecisionPlan.uniform("bfloat16", (n_layers, n_experts), 1),
    )
    weights = np.take_along_axis(probs, indices.astype(np.int64), axis=2)
    return RoutingTrace(
        spec, np.zeros(N_TOKENS), indices, weights, probs, {}, [0], np.arange(N_TOKENS),
        np.ones(N_TOKENS, dtype=np.bool_), ("all",),
    )  # fmt: skip


def seconds(work: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Return wall and processor seconds of some rounds, after one that does not count."""
    work()
    wall, processor = [], []
    for _ in range(ROUNDS):
        started, used = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    return wall, processor


def libcachesim_replay(
    trace: RoutingTrace, n_slots: int, folder: Path
) -> Callable[[], NDArray[np.float64]]:
    """Return a replay by libcachesim that gives the miss ratio of every layer."""
    record = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
    readers = []
    for layer in range(trace.spec.n_layers):
        requests = np.zeros(trace.n_tokens * trace.spec.top_k, dtype=record)
        requests["id"] = np.sort(trace.expert_indices[:, layer], axis=1).ravel()
        requests["size"] = 1
        path = folder / f"{trace.spec.n_experts}-{layer}.oracleGeneral"
        requests.tofile(path)
        kind = libcachesim.TraceType.ORACLE_GENERAL_TRACE
        readers.append(libcachesim.TraceReader(str(path), kind))

    def run() -> NDArray[np.float64]:
        ratios = []
        for reader in readers:
            reader.reset()
            ratios.append(libcachesim.LRU(n_slots, hashpower=HASH_POWER).process_trace(reader)[0])
        return np.array(ratios)

    return run


def with_candidates(trace: RoutingTrace, seed: int = 0) -> RoutingTrace:
    """Return the trace with candidates at three distances, four in five of them right."""
    rng, predictions = np.random.default_rng(seed), {}
    for distance in (1, 2, 3):
        is_right = rng.random((*trace.weights.shape[:2], 1)) < RIGHT_SHARE
        others = rng.integers(0, trace.spec.n_experts, trace.weights.shape)
        experts = np.where(is_right, trace.expert_indices, others)
        experts[:, :distance] = -1
        predictions[distance] = Prediction(experts, trace.weights)
    return replace(trace, predictions={"next_router": predictions})


def time_clocks(
    trace: RoutingTrace, keep: NDArray[np.bool_], plan: CachePlan, allowed_s: float
) -> list[dict[str, object]]:
    """Time a replay under LRU with its clock, nothing fetched ahead and something; print lines."""
    spec, predicting = trace.spec, with_candidates(trace)
    costs = StepCosts(
        HostCosts(dense_layer_s=3e-4),
        expert_s=3e-5,
        load_s=lambda n_bytes: 1e-6 * n_bytes,
        expert_bytes=np.full((spec.n_layers, spec.n_experts), 1000),
    )
    table = plan_prefetch(predicting, plan=plan)

    def run(table: PrefetchTable | None) -> Timeline:
        candidates = recorded_candidates(predicting, table)
        replayed = replay(predicting, keep, plan, "lru", candidates)
        return run_timeline(replayed, costs, candidates, table.buffer_slots if table else 0)

    rows = []
    for name, followed in (("with its clock", None), ("fetching ahead", table)):
        wall, processor = seconds(lambda followed=followed: run(followed))
        rows.append({"name": name, "wall_s": wall, "processor_s": processor})
        print(
            f"{spec.n_layers:3} x {spec.n_experts:3} top-{spec.top_k} lru {name:21}: "
            f"{1e3 * np.median(wall):5.0f} ms, at best {1e3 * min(wall):.0f}, of "
            f"{1e3 * allowed_s:.0f} allowed; {1e3 * np.median(processor):.0f} ms of processor time",
            flush=True,
        )
    return rows


def measure(n_layers: int, n_experts: int, top_k: int, allowed_s: float) -> dict[str, object]:
    """Time every policy on one size, and libcachesim; print a line each."""
    trace = synthetic_trace(n_layers, n_experts, top_k)
    keep = np.ones(trace.weights.shape, dtype=np.bool_)
    plan = slots_plan(trace.spec, n_experts // 2)
    uses = np.stack(
        [
            np.bincount(trace.expert_indices[:, i].ravel(), minlength=n_experts)
            for i in range(n_layers)
        ]
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        other = libcachesim_replay(trace, n_experts // 2, Path(folder))
        theirs_wall, theirs = seconds(other)
    for eviction, policy in POLICIES.items():
        for is_global in (False, True):
            given = shared(plan) if is_global else plan
            given = with_pins(given, uses) if policy.pins else given
            wall, processor = seconds(lambda g=given, e=eviction: replay(trace, keep, g, e))
            rows.append(
                {
                    "eviction": eviction,
                    "is_global": is_global,
                    "wall_s": wall,
                    "processor_s": processor,
                    "ratio_to_libcachesim_lru": float(np.median(theirs) / np.median(processor)),
                }
            )
            print(
                f"{n_layers:3} x {n_experts:3} top-{top_k} {eviction:15}"
                f"{'shared' if is_global else 'per layer':>10}: {1e3 * np.median(wall):5.0f} ms, "
                f"at best {1e3 * min(wall):.0f}, of {1e3 * allowed_s:.0f} allowed; "
                f"{1e3 * np.median(processor):.0f} ms of processor time, libcachesim's LRU takes "
                f"{rows[-1]['ratio_to_libcachesim_lru']:.2f}x",
                flush=True,
            )
    timed = time_clocks(trace, keep, plan, allowed_s)
    _, curve_s = seconds(lambda: miss_curves(trace))
    print(f"miss curves of every size: {1e3 * np.median(curve_s):.0f} ms of processor time")
    return {
        "n_layers": n_layers,
        "n_experts": n_experts,
        "top_k": top_k,
        "n_tokens": N_TOKENS,
        "allowed_s": allowed_s,
        "libcachesim_lru_wall_s": theirs_wall,
        "libcachesim_lru_processor_s": theirs,
        "miss_curves_processor_s": curve_s,
        "rows": rows,
        "timed": timed,
    }


def main() -> int:
    """Time every size, print a table, write the raw samples; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    document = {
        "n_cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "sizes": [measure(*size) for size in SIZES],
    }
    if options.out is not None:
        save_json(options.out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
