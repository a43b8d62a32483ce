"""Parts of a pool's steps that are the same under every policy, compiled.

Import it only where they run: numba comes with it.
"""

from __future__ import annotations

from adapmoe_lab.policies.eviction import fixed_point
from adapmoe_lab.policies.eviction.policy import PROTECTED
from adapmoe_lab.simulation.compiled import inlined

token_weight = inlined(fixed_point.token_weight)
mean_score = inlined(fixed_point.mean_score)


@inlined
def sum_scores(scores, first, end, layer, sums):
    """Fill `sums` [E] with the sums of the router scores of tokens first..end-1."""
    for expert in range(len(sums)):
        sums[expert] = scores.fixed[scores.bits[first, layer, expert]]
    for token in range(first + 1, end):
        for expert in range(len(sums)):
            sums[expert] += scores.fixed[scores.bits[token, layer, expert]]


@inlined
def mean_scores(scores, first, end, layer, means):
    """Fill `means` [E] with the mean router scores of tokens first..end-1."""
    sum_scores(scores, first, end, layer, means)
    weight = token_weight(end - first)
    for expert in range(len(means)):
        means[expert] = mean_score(means[expert], weight)


@inlined
def find_lowest(pool, layer):
    """Find the expert of a layer that would leave first, ties to the lowest id.

    Two halves, which share the middle of an odd number, are looked through side by side, since a
    comparison waits for the one before.
    """
    priorities, protected = pool.priorities, pool.protected
    n_half = (priorities.shape[1] + 1) // 2
    second_half = priorities.shape[1] - n_half
    a = b = (0, PROTECTED)
    for i in range(n_half):
        j = second_half + i
        a = _lower_branchless(a, i, priorities[layer, i] + protected[layer, i])
        b = _lower_branchless(b, j, priorities[layer, j] + protected[layer, j])
    at, least = _lower(a, b[0], b[1])
    pool.lowest[layer], pool.lowest_key[layer] = at, least - pool.penalty[layer]


@inlined
def _lower_branchless(best, at, value):
    """Return the lower of two pairs of a place and its value, ties to the first, by no branch.

    Which one is lower among few experts is chance: a processor that predicts it is mostly wrong.
    """
    below = value - best[1]
    is_below = below >> 63  # every bit set, or none
    return best[0] + ((at - best[0]) & is_below), best[1] + (below & is_below)


@inlined
def _lower(best, at, value):
    """Return the lower of two pairs of a place and its value, ties to the first."""
    return (at, value) if value < best[1] else best


@inlined
def set_penalty(pool, layer, new):
    """Change what a layer's priorities lose, keeping its lowest key up to date."""
    pool.lowest_key[layer] += pool.penalty[layer] - new
    pool.penalty[layer] = new


@inlined
def layer_to_leave(lowest_key):
    """Return the layer whose lowest expert leaves first, ties to the lowest layer.

    Four runs of layers are compared side by side, since a comparison waits for the one before.
    """
    run = len(lowest_key) // 4
    a = b = c = d = (0, PROTECTED)
    for i in range(run):
        a = _lower(a, i, lowest_key[i])
        b = _lower(b, i + run, lowest_key[i + run])
        c = _lower(c, i + 2 * run, lowest_key[i + 2 * run])
        d = _lower(d, i + 3 * run, lowest_key[i + 3 * run])
    return _lower(_lower(a, b[0], b[1]), *_lower(c, d[0], d[1]))[0]


@inlined
def evict(pool):
    """Take out the expert that leaves first."""
    layer = layer_to_leave(pool.lowest_key)
    victim = pool.lowest[layer]
    pool.resident[layer, victim] = False
    pool.protected[layer, victim] = PROTECTED
    find_lowest(pool, layer)


@inlined
def release(pool, members, layer, first, end):
    """Let a step's members leave again, keeping the layer's lowest expert up to date."""
    for i in range(first, end):
        expert = members[layer, i]
        if pool.resident[layer, expert] and not pool.pinned[layer, expert]:
            pool.protected[layer, expert] = 0
            key = pool.priorities[layer, expert] - pool.penalty[layer]
            least, at = pool.lowest_key[layer], pool.lowest[layer]
            if key < least or (key == least and expert < at):
                pool.lowest[layer], pool.lowest_key[layer] = expert, key


@inlined
def note_absent(predicted, j, step, layer, resident):
    """Note which candidates of a predictor for a layer are not resident [E] now."""
    experts, absent = predicted.experts[j, step, layer], predicted.absent[j, step, layer]
    for c in range(len(experts)):
        absent[c] = experts[c] >= 0 and not resident[experts[c]]
