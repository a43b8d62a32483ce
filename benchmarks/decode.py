"""One decode step at a real model's geometry: captured, host-driven, and as others do it.

`python benchmarks/decode.py --geometry olmoe|qwen3|mixtral --out FILE.json [--recording FILE.npz]
[--rows NAME ...] [--shares S ...] [--seconds N] [--quick]`

Weights are random, tokens are given, and so is the routing, for all rows alike: drawn (each expert
stays for the next token with probability 0.6), recorded (of the file; for OLMoE of the third model,
for Mixtral of the demo on this project's README or `--text`, which have as many layers and
experts), and for captured steps and the host the routers' own choices. Every step is synchronised.
Beside each row stand its misses and its limit: for every token the longer of what it reads on the
device and what it fetches, at the rates measured in the same run; keys and values are left out.
Relative errors of the logits are against the model in float32 under the same routing.

The rows of AdapMoE's policy skip a quarter of the activations by one cut on the weights and divide
the same slots by a dynamic program (AdapMoE's own loads for top-2, measured miss curves else). The
host fetches ahead what is predicted of the next layer: as recorded, else drawn to name 85 % of it;
captured steps do not. What skipping costs in loss a random model cannot say; of the demo the README
does.

The file is saved after every row, and a Chrome trace of one step is written at the end. A row that
fails is kept with its error; rows run in the order of `ROWS`, and those for which no time is left
are named.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from decode_bench import (
    GEOMETRIES,
    N_PROMPT,
    N_TIMED,
    N_WARM,
    Bench,
    Steps,
    checkpoint_folder,
    free_memory,
    wait_for,
)
from decode_rows import ROWS, SHARES, Row
from given_routing import Routing, demo_recording, drawn_routing, recorded_routing

from adapmoe_lab.assets import data_folder
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.evaluation.texts import read_texts
from adapmoe_lab.records import RoutingTrace
from adapmoe_lab.records.files import save_json

QUICK_ROWS = ("graph", "graph compiled", "stock grouped_mm compiled captured", "host")
QUICK_SHARES = (0.5, 1.0)
SECONDS, QUICK_SECONDS = 450, 170
RECORDINGS = {"olmoe": "third_model/routing.npz"}
"""Of a trained model with as many layers and experts."""

EXPERTS_OF_DEMO = ("mixtral",)
PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy")
TIMELINE_SHARE = 0.5


@dataclass(frozen=True)
class Run:
    """A row to run, under which routing, with which share of the experts in slots."""

    name: str
    routing: str
    share: float

    @property
    def row(self) -> Row:
        """What it is."""
        return ROWS[self.name]


def runs_of(names: Sequence[str], routings: Sequence[str], shares: Sequence[float]) -> list[Run]:
    """Return all runs by importance: stage by stage, and in each routing by routing."""
    runs = [
        Run(name, routing, share)
        for routing in routings
        for name, row in ROWS.items()
        if name in names and routing in row.routings
        for share in row.shares
        if share in shares or len(row.shares) == 1
    ]
    return sorted(runs, key=lambda run: run.row.stage)


def routings_of(options: argparse.Namespace, bench: Bench) -> dict[str, Routing | None]:
    """Return the routings there are, by where they are from."""
    spec, n_tokens = bench.spec, len(bench.text.ids)
    sizes = spec.n_layers, spec.n_experts, spec.top_k
    found: dict[str, Routing | None] = {"drawn": drawn_routing(n_tokens, *sizes)}
    if options.quick:
        return found
    recording, path = None, options.recording
    if path is None and options.geometry in RECORDINGS:
        path = data_folder() / RECORDINGS[options.geometry]
        path = path if path.is_file() else None
    if path is not None:
        recording = RoutingTrace.load(path)
    elif options.geometry in EXPERTS_OF_DEMO:
        recording = demo_recording(["\n\n".join(read_texts(options.text))])
    if recording is not None:
        found["recorded"] = recorded_routing(recording, n_tokens, spec)
    return {**found, "own": None}


def result_of(bench: Bench, steps: Steps, row: Row) -> dict[str, Any]:
    """Return what a row found: times, limit, misses and errors."""
    limits_ms, ms = 1e3 * bench.limits_s(steps), 1e3 * steps.seconds
    exact = bench.exact_logits() if row.is_exact else None
    errors = None
    if exact is not None:
        exact = exact[-N_TIMED:] if len(ms) == N_TIMED else exact[1 : 1 + len(ms)]
        error = (steps.logits - exact).norm(dim=1) / exact.norm(dim=1)
        errors = [float(error.max()), float(error.median())]
    return {
        "ms": float(np.median(ms)),
        "p10_ms": float(np.percentile(ms, 10)),
        "p90_ms": float(np.percentile(ms, 90)),
        "mean_ms": float(ms.mean()),
        "misses_per_token": float(steps.misses.mean()),
        "experts_run_per_token": float(steps.n_run.mean()),
        "moved_bytes_per_token": float(steps.moved_bytes.mean()),
        "limit_ms": float(limits_ms.mean()),
        "limit_over_measured": float(limits_ms.mean() / ms.mean()),
        "largest_and_median_error": errors,
        "samples_ms": ms.tolist(),
        "misses": steps.misses.tolist(),
    }


def run_one(bench: Bench, run: Run) -> dict[str, Any]:
    """Run a row; return what it found, or its error."""
    found: dict[str, Any] = {"row": run.name, "routing": run.routing, "share": run.share}
    start = time.perf_counter()
    try:
        if run.row.is_exact:
            bench.exact_logits()  # kept; the row may spend the model
        found |= result_of(bench, run.row.run(bench, run.share), run.row)
        if not run.row.is_exact:
            found["slots_by_layer"] = bench.served.engine.plan.slots.tolist()
    except Exception as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"
    free_memory()
    found["took_s"] = time.perf_counter() - start
    return found


def print_row(found: dict[str, Any]) -> None:
    """Print a row of the table."""
    begin = f"{found['routing']:8} {found['row']:35} {found['share']:4.0%}"
    if "error" in found:
        print(f"{begin} failed: {found['error'].splitlines()[0][:120]}", flush=True)
        return
    errors = found["largest_and_median_error"]
    print(
        f"{begin} {found['ms']:9.2f} {found['p10_ms']:9.2f} {found['p90_ms']:9.2f} "
        f"{found['misses_per_token']:8.1f} {found['moved_bytes_per_token'] / 1e6:9.1f} "
        f"{found['limit_ms']:8.2f} {found['limit_over_measured']:6.2f}  "
        + ("-" if errors is None else f"{errors[0]:.1e}"),
        flush=True,
    )


HEADER = (
    f"{'routing':8} {'row':35} {'slots':>4} {'ms':>9} {'p10':>9} {'p90':>9} {'misses':>8} "
    f"{'MB moved':>9} {'limit ms':>8} {'share':>6}  error"
)


def counters_are_equal(rows: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Return whether captured steps missed what the host did, step by step, wherever both ran."""
    misses = {
        (found["row"], found["routing"], found["share"]): found["misses"]
        for found in rows
        if "misses" in found and found["routing"] != "own"  # where rounding may route otherwise
    }
    return {
        f"{row}, {routing}, {share:.0%}": missed == misses["host", routing, share]
        for (row, routing, share), missed in misses.items()
        if row in ("graph", "graph compiled") and ("host", routing, share) in misses
    }


def write_timeline(bench: Bench, share: float, path: Path) -> None:
    """Write a Chrome trace of one step, replayed where steps are."""
    from torch.profiler import ProfilerActivity, profile

    bench.served.apply(bench.plan_config(share))
    decoder = bench.served.decoder()
    *warm, last = bench.text.ids[N_PROMPT:][: N_WARM + 1].tolist()
    bench.text.position.zero_()
    with torch.no_grad():
        decoder.prefill(bench.text.ids[:N_PROMPT])
        bench.text.position.fill_(N_PROMPT)
        for token in warm:
            decoder.step(token)
            bench.text.position.add_(1)
        wait_for(bench.device)
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if bench.device.type == "cuda" else []
        with profile(activities=activities) as found:
            decoder.step(last)
            wait_for(bench.device)
    found.export_chrome_trace(str(path))


def run_all(bench: Bench, options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Run rows while there is time, and save the record after each."""
    routings = routings_of(options, bench)
    record["routings"] = {name: routing and routing.name for name, routing in routings.items()}
    runs = runs_of(options.rows, list(routings), options.shares)
    rows, skipped = record["rows"], []
    print(HEADER, flush=True)
    for number, run in enumerate(runs):
        if elapsed_s() + run.row.expected_s > options.seconds:
            skipped.append(run)
        else:
            bench.text.use(routings[run.routing])
            rows.append(run_one(bench, run))
            print_row(rows[-1])
        record["not_run"] = [asdict(left) for left in [*skipped, *runs[number + 1 :]]]
        record["counters_are_equal"] = counters_are_equal(rows)
        save_json(options.out, record)
    if skipped:
        print(f"No time was left for {len(skipped)} rows: see not_run.")
    if not options.quick:
        path = options.out.with_name(f"{options.out.name.removesuffix('.json')}-timeline.json.gz")
        bench.text.use(routings["drawn"])
        write_timeline(bench, TIMELINE_SHARE, path)


def elapsed_s() -> float:
    """Return the seconds since this process was started."""
    return time.time() - psutil.Process().create_time()


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    readme = Path(__file__).parents[1] / "README.md"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=list(GEOMETRIES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recording", type=Path, help="a saved RoutingTrace")
    parser.add_argument("--text", type=Path, default=readme, help="recorded on the demo, Mixtral")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", default=list(ROWS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="from the process's start")
    parser.add_argument("--quick", action="store_true", help="four rows, drawn routing")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor", help="what compiles; none: nothing")
    options = parser.parse_args(arguments)
    if options.recording is not None and not options.recording.is_file():
        parser.error(f"--recording: there is no file {options.recording}")
    if options.quick:
        options.rows, options.shares, options.seconds = QUICK_ROWS, QUICK_SHARES, QUICK_SECONDS
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a row failed or counters differ."""
    options = parsed(arguments)
    torch._dynamo.config.cache_size_limit = 64
    backend = None if options.backend == "none" else options.backend
    with checkpoint_folder(options.geometry, options.folder) as folder:
        bench = Bench(options.geometry, folder, torch.device(options.device), backend)
        record: dict[str, Any] = {
            "geometry": options.geometry,
            "sizes": GEOMETRIES[options.geometry],
            "steps": {"prompt": N_PROMPT, "warm": N_WARM, "timed": N_TIMED},
            "versions": {name: version(name) for name in PACKAGES if is_installed(name)},
            "python": platform.python_version(),
            "conditions": measurement_conditions(bench.served),
            "rates_bytes_per_s": bench.rates._asdict(),
            "dense_bytes": bench.dense_bytes,
            "expert_bytes": bench.spec.stored_expert_bytes,
            "setup_s": elapsed_s(),
            "rows": [],
        }
        print(f"set up in {record['setup_s']:.0f} s; {bench.rates}", flush=True)
        try:
            run_all(bench, options, record)
        finally:
            bench.close()
    failed = [found["row"] for found in record["rows"] if "error" in found]
    print(f"{elapsed_s():.0f} s; counters equal: {record['counters_are_equal']}; failed: {failed}")
    return 1 if failed or not all(record["counters_are_equal"].values()) else 0


def is_installed(package: str) -> bool:
    """Whether a package is there."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
