"""How often each layer misses with every number of slots: what slots are worth where."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.records import GatingTable, RoutingTrace
from adapmoe_lab.simulation.replay.expert_sets import expert_sets, in_threads
from adapmoe_lab.simulation.replay.recorded_candidates import step_bounds


def miss_curves(trace: RoutingTrace, gating: GatingTable | None = None) -> NDArray[np.float64]:
    """Return the misses per step of each layer with 0..E slots of its own under LRU, [L, E+1].

    Exact, by the step rules, in one pass over the trace for all sizes. Cold misses count.

    Args:
        trace: recorded routing; every token is taken as a decode step of its own.
        gating: which of the routed experts are run; None for all.
    """
    from adapmoe_lab.simulation.replay.stack_loops import count_misses, empty_stack

    steps = trace.as_decode()
    bounds = step_bounds(steps)
    members, starts = expert_sets(steps, kept_experts(steps, gating), bounds)
    n_layers, n_experts = trace.spec.n_layers, trace.spec.n_experts
    growth = np.zeros((n_layers, n_experts + 2), dtype=np.int64)

    def count(layer: int) -> None:
        count_misses(members[layer], starts[layer], empty_stack(n_experts), growth[layer])

    in_threads(count, n_layers)
    return growth.cumsum(axis=1)[:, :-1] / (len(bounds) - 1)
