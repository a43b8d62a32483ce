"""Whether an executor counts what a replay of the same routing counts."""

from __future__ import annotations

from typing import Any

import numpy as np

from adapmoe_lab.engine.memory_plan import in_words
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.records.verify_report import Check
from adapmoe_lab.simulation.simulate import bytes_missed, replayed_and_timed
from adapmoe_lab.tuning.verify.decoded import Decoded

EXECUTOR = "executor"


def check_executor(decoded: Decoded) -> Check:
    """Compare what an executor counted of a recorded decode with a replay of the recording.

    What is prefetched depends on when it is, so experts that are not resident count as one,
    whether they were prefetched or demanded, and bytes are compared where nothing is prefetched.
    What is recorded is observed, so that a graph-captured executor runs it layer by layer: its
    captured steps are not seen here.
    """
    counted, replayed = _counted(decoded), _replayed(decoded)
    unlike = [key for key in counted if counted[key] != replayed[key]]
    hits, misses = sum(counted["hits"]), sum(counted["misses"])
    name = decoded.runs_steps_by
    how = "" if name == "host" else ", observed layer by layer"
    found = (
        f"{name}{how}: {hits:,} hits, {misses:,} misses, "
        f"{in_words(decoded.traffic.bytes_moved)} in {decoded.traffic.n_steps} steps"
    )
    if unlike:
        found += f"; replayed otherwise: {', '.join(unlike)}"
    return Check(
        EXECUTOR,
        "failed" if unlike else "passed",
        found,
        f"a replay's {', '.join(counted)}",
        {"name": name, "counted": counted, "replayed": replayed},
    )


def _counted(decoded: Decoded) -> dict[str, Any]:
    traffic = decoded.traffic
    counted = {
        "hits": traffic.hits.tolist(),
        "misses": (traffic.misses + traffic.prefetch_used).tolist(),
        "kept": traffic.kept,
        "skipped": traffic.skipped,
    }
    return counted if _prefetches(decoded) else {**counted, "bytes": traffic.bytes_moved}


def _replayed(decoded: Decoded) -> dict[str, Any]:
    trace, config = decoded.trace, decoded.config
    keep = kept_experts(trace, config.gating)
    found, _ = replayed_and_timed(trace, config, keep, hardware=None)
    counted = {
        "hits": found.hits.sum(axis=0).tolist(),
        "misses": found.misses.sum(axis=0).tolist(),
        "kept": int(np.count_nonzero(keep)),
        "skipped": int(np.count_nonzero(~keep)),
    }
    if _prefetches(decoded):
        return counted
    n_bytes = bytes_missed(found, trace.spec.sizes_in(config.precision))
    return {**counted, "bytes": int(n_bytes.sum())}


def _prefetches(decoded: Decoded) -> bool:
    return decoded.config.prefetch is not None
