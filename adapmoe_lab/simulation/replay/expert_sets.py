"""Which distinct experts every step of a recorded trace needs; threads share the layers."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records import RoutingTrace


def expert_sets(
    trace: RoutingTrace, keep: NDArray[np.bool_], bounds: NDArray[np.int64]
) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
    """Return the distinct experts of every step and layer.

    Args:
        trace: recorded routing.
        keep: bool [T, L, K], which of the routed experts are run.
        bounds: of its steps, see `step_bounds`.

    Returns:
        The sets of each layer one after another, ascending, int16 [L, T K]; where each begins and
        the last one ends, int32 [L, N+1].
    """
    from adapmoe_lab.simulation.replay.set_loops import collect_sets

    n_tokens, n_layers, top_k = trace.expert_indices.shape
    members = np.empty((n_layers, n_tokens * top_k), dtype=np.int16)
    starts = np.empty((n_layers, len(bounds)), dtype=np.int32)
    keep = np.ascontiguousarray(keep)

    def collect(layer: int) -> None:
        last_step = np.full(trace.spec.n_experts, -1)
        own = members[layer], starts[layer]
        collect_sets(trace.expert_indices, keep, bounds, layer, last_step, *own)

    in_threads(collect, n_layers)
    return members, starts


def in_threads(work: Callable[[int], None], n: int) -> None:
    """Do work 0..n-1, as many at once as there are cores."""
    if n == 1:
        work(0)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(work, range(n)):
            pass
