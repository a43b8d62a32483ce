"""The step rules under LRU, written out plainly, and replays of given sets step by step."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from step_rules import Done
from traces import make_spec

from adapmoe_lab.records import RoutingTrace
from adapmoe_lab.simulation.replay.outcomes import HIT, LOAD, STREAM
from adapmoe_lab.simulation.replay.replay import replay


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


def trace_of(sets, n_experts, scores):
    """Return a trace of one token per member, whose steps need exactly these sets.

    `scores` [step, layer, E] are those of each token.
    """
    n_layers = len(sets[0])
    widths = [max(len(members) for members in layers) for layers in sets]
    indices, router_probs, steps = [], [], []
    for step, (layers, width) in enumerate(zip(sets, widths, strict=True)):
        filled = [(sorted(members) * width)[:width] for members in layers]
        indices += np.array(filled).T[:, :, None].tolist()
        router_probs += [scores[step]] * width
        steps += [step] * width
    n = len(steps)
    return RoutingTrace(
        spec=make_spec(n_layers, n_experts, top_k=1),
        token_ids=np.zeros(n),
        expert_indices=indices,
        weights=np.ones((n, n_layers, 1)),
        router_probs=router_probs,
        predictions={},
        sequence_starts=[0],
        step_ids=steps,
        is_decode=np.zeros(n, dtype=bool),
        labels=("all",),
    )


def replay_all(trace, plan, eviction):
    """Replay a trace none of whose experts is skipped."""
    return replay(trace, np.ones(trace.weights.shape, dtype=bool), plan, eviction)


def run_replay(trace, plan, eviction):
    """Return what the replay of a trace does, as `step_rules.Done`, without who was evicted."""
    replayed, done = replay_all(trace, plan, eviction), []
    for step in range(len(replayed.hits)):
        for layer, starts in enumerate(replayed.starts):
            own = slice(starts[step], starts[step + 1])
            members, outcomes = replayed.members[layer, own], replayed.outcomes[layer, own]
            kinds = [members[outcomes == kind].tolist() for kind in (HIT, LOAD, STREAM)]
            of_step = replayed.hits, replayed.loads, replayed.streamed
            assert [n[step, layer] for n in of_step] == [len(experts) for experts in kinds]
            done.append(Done(layer, *kinds))
    return done
