"""The step rules of the design, written out plainly, to hold engine and simulation against."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np


def step_by_step(trace, cuts, n_slots):
    """Return hits and misses [N, L] of a trace under one cut on the share per layer.

    Top-2 only. The distinct experts of a step form one set; its hits are those resident before;
    hits, then misses, ascending, become the most recent; no member leaves during its own step;
    what has no room passes through.
    """
    steps = sorted(set(trace.step_ids.tolist()))
    hits, misses = np.zeros((2, len(steps), trace.spec.n_layers), dtype=int)
    for layer in range(trace.spec.n_layers):
        resident: OrderedDict[int, None] = OrderedDict()
        for number, step in enumerate(steps):
            members = sorted(_needed(trace, layer, step, cuts[layer]))
            found = [expert for expert in members if expert in resident]
            missing = [expert for expert in members if expert not in resident]
            placed = missing[: n_slots - len(found)]
            while len(resident) + len(placed) > n_slots:
                resident.pop(next(expert for expert in resident if expert not in members))
            for expert in [*found, *placed]:
                resident[expert] = None
                resident.move_to_end(expert)
            hits[number, layer], misses[number, layer] = len(found), len(missing)
    return hits, misses


def _needed(trace, layer, step, cut):
    needed = set()
    for token in np.flatnonzero(trace.step_ids == step):
        experts = trace.expert_indices[token, layer].tolist()
        weights = trace.weights[token, layer]
        best = int(np.argmax(weights))
        needed.add(experts[best])
        if weights[best] / weights.sum() < cut:
            needed.add(experts[1 - best])
    return needed
