"""The loops of a replay, compiled. Import it only where they run, since that imports numba.

Functions take one layer or one pool each, so that threads share the layers.
"""

from __future__ import annotations

import numpy as np

from adapmoe_lab.policies.eviction import rules as eviction
from adapmoe_lab.policies.eviction.rules import (
    BELADY,
    HOBBIT,
    LEAST_STALE,
    LFU_AGED,
    NEVER_LEAVES,
    ROUTER_AVERAGE,
)
from adapmoe_lab.simulation.compiled import compiled, inlined
from adapmoe_lab.simulation.replay.replay import HIT, LOAD, STREAM

priority_in_new_pass = inlined(eviction.priority_in_new_pass)
priority_in_new_step = inlined(eviction.priority_in_new_step)
after_use = inlined(eviction.after_use)
is_high_precision = inlined(eviction.is_high_precision)
distance_penalty = inlined(eviction.distance_penalty)
token_weight = inlined(eviction.token_weight)
mean_score = inlined(eviction.mean_score)


@compiled
def collect_sets(indices, keep, bounds, layer, last_step, members, starts):
    """Write down the distinct experts, ascending, that a layer needs in every step.

    Args:
        indices: int16 [T, L, K], the router's choice.
        keep: bool [T, L, K], which of them are run.
        bounds: int64 [N+1], first token of every step, and T.
        layer: which layer.
        last_step: int64 [E], -1 everywhere; working space.
        members: int16 [T K], filled with the sets one after another.
        starts: int32 [N+1], filled with where each set begins, and the last one ends.
    """
    n = 0
    for step in range(len(bounds) - 1):
        starts[step] = n
        for token in range(bounds[step], bounds[step + 1]):
            for k in range(indices.shape[2]):
                expert = indices[token, layer, k]
                if keep[token, layer, k] and last_step[expert] != step:
                    last_step[expert] = step
                    at = n
                    while at > starts[step] and members[at - 1] > expert:
                        members[at] = members[at - 1]
                        at -= 1
                    members[at] = expert
                    n += 1
    starts[len(bounds) - 1] = n


@compiled
def next_uses(members, starts, layer, n_layers, upcoming, oracle_inputs):
    """Fill `oracle_inputs` [T K] with the time of every member's next use.

    Times count the steps of all `n_layers` layers of a pool; `layer` is the number in it.
    `upcoming` [E] holds a time after the last step everywhere; working space.
    """
    for step in range(len(starts) - 2, -1, -1):
        for i in range(starts[step], starts[step + 1]):
            oracle_inputs[i] = upcoming[members[i]]
        for i in range(starts[step], starts[step + 1]):
            upcoming[members[i]] = step * n_layers + layer


@compiled
def high_precision_uses(members, starts, layer, bits, fixed, bounds, scores, oracle_inputs):
    """Fill `oracle_inputs` [T K] with 1 for uses that HOBBIT would load in high precision, else 0.

    `layer` is the number among the model's; `scores` [E] is working space, and `bits`, `fixed` and
    `bounds` are as `replay_pool` takes them.
    """
    for step in range(len(bounds) - 1):
        _sum_scores(bits, fixed, bounds[step], bounds[step + 1], layer, scores)
        total = 0
        for i in range(starts[step], starts[step + 1]):
            total += scores[members[i]]
        for own in range(starts[step], starts[step + 1]):
            above = 0
            for i in range(starts[step], starts[step + 1]):
                if scores[members[i]] > scores[members[own]]:
                    above += scores[members[i]]
            oracle_inputs[own] = is_high_precision(above, total)


@inlined
def _sum_scores(bits, fixed, first, end, layer, scores):
    """Fill `scores` [E] with the sums of the router scores of tokens first..end-1."""
    for expert in range(len(scores)):
        scores[expert] = fixed[bits[first, layer, expert]]
    for token in range(first + 1, end):
        for expert in range(len(scores)):
            scores[expert] += fixed[bits[token, layer, expert]]


@inlined
def _mean_scores(bits, fixed, first, end, layer, scores):
    """Fill `scores` [E] with the mean router scores of tokens first..end-1."""
    _sum_scores(bits, fixed, first, end, layer, scores)
    weight = token_weight(end - first)
    for expert in range(len(scores)):
        scores[expert] = mean_score(scores[expert], weight)


@inlined
def _find_lowest(values, protected, penalty, lowest, lowest_value, layer):
    """Find the expert of a layer that would leave first, ties to the lowest id.

    Two halves, which share the middle of an odd number, are looked through side by side, since a
    comparison waits for the one before.
    """
    n_half = (values.shape[1] + 1) // 2
    second_half = values.shape[1] - n_half
    a = b = (0, NEVER_LEAVES)
    for i in range(n_half):
        j = second_half + i
        a = _lower_branchless(a, i, values[layer, i] + protected[layer, i])
        b = _lower_branchless(b, j, values[layer, j] + protected[layer, j])
    at, least = _lower(a, b[0], b[1])
    lowest[layer], lowest_value[layer] = at, least - penalty[layer]


@inlined
def _lower_branchless(best, at, value):
    """Return the lower of two pairs of a place and its value, ties to the first, by no branch.

    Which one is lower among few experts is chance: a processor that predicts it is mostly wrong.
    """
    below = value - best[1]
    is_below = below >> 63  # every bit set, or none
    return best[0] + ((at - best[0]) & is_below), best[1] + (below & is_below)


@inlined
def _begin_pass(rule, step, values, protected, penalty, lowest, lowest_value):
    """Change what changes as a forward pass begins, under least-stale and HOBBIT."""
    for layer in range(len(values)):
        if rule == LEAST_STALE:
            for expert in range(values.shape[1]):
                values[layer, expert] = priority_in_new_pass(rule, values[layer, expert])
            _find_lowest(values, protected, penalty, lowest, lowest_value, layer)
        if rule == HOBBIT:
            _set_penalty(penalty, lowest_value, layer, distance_penalty(rule, layer, step))


@inlined
def _set_penalty(penalty, lowest_value, layer, new):
    """Change what a layer's values lose, keeping its lowest value up to date."""
    lowest_value[layer] += penalty[layer] - new
    penalty[layer] = new


@inlined
def _lower(best, at, value):
    """Return the lower of two pairs of a place and its value, ties to the first."""
    return (at, value) if value < best[1] else best


@inlined
def _layer_to_leave(lowest_value):
    """Return the layer whose lowest expert leaves first, ties to the lowest layer.

    Four runs of layers are compared side by side, since a comparison waits for the one before.
    """
    run = len(lowest_value) // 4
    a = b = c = d = (0, NEVER_LEAVES)
    for i in range(run):
        a = _lower(a, i, lowest_value[i])
        b = _lower(b, i + run, lowest_value[i + run])
        c = _lower(c, i + 2 * run, lowest_value[i + 2 * run])
        d = _lower(d, i + 3 * run, lowest_value[i + 3 * run])
    return _lower(_lower(a, b[0], b[1]), *_lower(c, d[0], d[1]))[0]


@inlined
def _release(
    values, resident, protected, penalty, lowest, lowest_value, members, layer, first, end, pinned
):  # fmt: skip
    """Let a step's members leave again, keeping the layer's lowest expert up to date."""
    for i in range(first, end):
        expert = members[layer, i]
        if resident[layer, expert] and not pinned[layer, expert]:
            protected[layer, expert] = 0
            value = values[layer, expert] - penalty[layer]
            least, at = lowest_value[layer], lowest[layer]
            if value < least or (value == least and expert < at):
                lowest[layer], lowest_value[layer] = expert, value


@inlined
def _note_absent(predicted, absent, resident):
    """Fill `absent` [C] with whether each predicted expert is not resident now."""
    for c in range(len(predicted)):
        absent[c] = predicted[c] >= 0 and not resident[predicted[c]]


@compiled
def replay_pool(
    rule, n_slots, first_layer, members, starts, oracle_inputs, bits, fixed, bounds, pinned, state,
    out,    outcomes, distances, predicted, absent,
):  # fmt: skip
    """Replay every step of the layers that share a pool of slots.

    The inner loop is one function on purpose: it runs a million times for a long trace.

    Args:
        rule: of the eviction policy.
        n_slots: slots of the pool.
        first_layer: number of the pool's first layer among the model's.
        members: int16 [L, T K], the sets of the pool's layers, as `collect_sets` gives them.
        starts: int32 [L, N+1], where each set begins.
        oracle_inputs: int32 [L, T K], what `after_use` is told of each use, for rules that need it.
        bits: uint16 [T, L of the model, E], the router's scores as the bits of float16, read by
            the rule that averages them.
        fixed: `FIXED_SCORES`.
        bounds: int64 [N+1], first token of every step, and T.
        pinned: bool [L, E], experts that never leave.
        state: what `empty_pool` returns.
        out: int16 [N, L, 3], filled with hits, loads and streamed experts.
        outcomes: int8 [L, T K], filled with what becomes of each member: HIT, LOAD or STREAM.
        distances: int64 [J], from how many layers before a layer's experts are predicted; 0 for
            before the pass begins.
        predicted: int16 [J, N, L of the model, C], the candidates, -1 for none.
        absent: bool [J, N, L of the model, C], filled with which of them are not resident at the
            hook_point of predicting.
    """
    values, memory, resident, protected, penalty, lowest, lowest_value, missing, scores = state
    n_layers, n_experts = values.shape
    moves_all = rule in (LFU_AGED, ROUTER_AVERAGE)
    n_free, n_may_leave, clock = n_slots, 0, 0
    for step in range(len(bounds) - 1):
        for layer in range(n_layers):
            first, end = starts[layer, step], starts[layer, step + 1]
            if rule == ROUTER_AVERAGE:
                _mean_scores(
                    bits, fixed, bounds[step], bounds[step + 1], first_layer + layer, scores
                )
            if layer == 0 and rule in (LEAST_STALE, HOBBIT):
                _begin_pass(rule, step, values, protected, penalty, lowest, lowest_value)
            for j in range(len(distances)):
                if n_layers == 1 or (layer == 0 and distances[j] == 0):
                    at = first_layer + layer
                    _note_absent(predicted[j, step, at], absent[j, step, at], resident[layer])
            for expert in range(n_experts if moves_all else 0):
                value = values[layer, expert]
                values[layer, expert] = priority_in_new_step(rule, value, scores[expert])
            n_missing, n_protected, is_lowest_known = 0, 0, not moves_all
            for i in range(first, end):
                expert = members[layer, i]
                if protected[layer, expert] == 0:
                    protected[layer, expert] = NEVER_LEAVES
                    n_protected += 1
                    is_lowest_known &= expert != lowest[layer]
                was_resident, oracle_input = int(resident[layer, expert]), 0
                outcomes[layer, i] = HIT if was_resident else STREAM
                missing[n_missing] = i
                n_missing += 1 - was_resident
                if rule in (BELADY, HOBBIT):
                    oracle_input = oracle_inputs[layer, i]
                values[layer, expert], memory[layer, expert] = after_use(
                    rule, values[layer, expert], memory[layer, expert], was_resident, oracle_input,
                    clock, n_layers, step,
                )  # fmt: skip
            if not is_lowest_known:
                _find_lowest(values, protected, penalty, lowest, lowest_value, layer)
            n_loads = min(n_missing, n_free + n_may_leave - n_protected)
            for number in range(n_loads):
                if n_free > 0:
                    n_free -= 1
                else:
                    at = _layer_to_leave(lowest_value)
                    resident[at, lowest[at]] = False
                    protected[at, lowest[at]] = NEVER_LEAVES
                    _find_lowest(values, protected, penalty, lowest, lowest_value, at)
                    n_may_leave -= 1
                expert = members[layer, missing[number]]
                outcomes[layer, missing[number]] = LOAD
                resident[layer, expert] = True
                n_may_leave += not pinned[layer, expert]
            for j in range(len(distances) if n_layers > 1 else 0):
                at = layer + distances[j]
                if distances[j] > 0 and at < n_layers:
                    _note_absent(predicted[j, step, at], absent[j, step, at], resident[at])
            if rule == HOBBIT:
                later = distance_penalty(rule, layer + n_layers, step)
                _set_penalty(penalty, lowest_value, layer, later)
            _release(
                values, resident, protected, penalty, lowest, lowest_value, members, layer, first,
 end, pinned,
            )  # fmt: skip
            out[step, layer, 0] = end - first - n_missing
            out[step, layer, 1] = n_loads
            out[step, layer, 2] = n_missing - n_loads
            clock += 1


def empty_pool(n_layers: int, n_experts: int) -> tuple[np.ndarray, ...]:
    """Return what a pool keeps of its layers' experts, with no expert resident.

    In order: values [L, E] by which experts leave; memory [L, E] that some rules keep; whether an
    expert is resident [L, E]; 0 for one that may leave and `NEVER_LEAVES` for one that may not
    [L, E]; what a layer's values lose until its next step, counted from the pass's beginning, since
    what all lose does not matter [L]; each layer's expert that would leave first [L], and its
    value, with `NEVER_LEAVES` up to a multiple of four; room for the missing experts and for the
    scores of one step.
    """
    shape, n_padded = (n_layers, n_experts), n_layers + -n_layers % 4
    return (
        np.zeros(shape, dtype=np.int64),
        np.zeros(shape, dtype=np.int64),
        np.zeros(shape, dtype=np.bool_),
        np.full(shape, NEVER_LEAVES),
        np.zeros(n_layers, dtype=np.int64),
        np.full(n_layers, -1),
        np.full(n_padded, NEVER_LEAVES),
        np.zeros(n_experts + 1, dtype=np.int64),
        np.zeros(n_experts, dtype=np.int64),
    )
