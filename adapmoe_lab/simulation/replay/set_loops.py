"""The sets of experts that steps need, compiled. Import it only where it runs."""

from __future__ import annotations

from adapmoe_lab.simulation.compiled import compiled


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
