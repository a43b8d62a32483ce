"""Prefetch by expected gain: which candidates are worth the link's idle time, and which goes first.

A prefetched expert goes to a buffer beside the cache, so that a wrong prediction evicts nothing and
residency is the same with and without prefetch. It crosses the link in chunks, each begun only
while no demand waits; what is not begun when its layer is reached was never fetched, and a wrong
prediction delays a demand by one chunk at most.

The arithmetic here is of plain numbers: what runs a model calls it as it stands, simulation
compiles it, so that both decide alike.
"""

from __future__ import annotations

from adapmoe_lab.records.step_costs import N_CHUNKS

MOST_ISSUED = 2**32
"""More prefetches than a run issues. With any number of layers up to 2^20, priorities are exact in
float64 too."""


def priority(layer: int, n_issued: int) -> int:
    """Return what decides whose next chunk goes first, the smaller the sooner.

    The nearest layer goes first, and of one layer the prefetch that was issued first.

    Args:
        layer: whose expert it is.
        n_issued: prefetches issued before it.
    """
    return layer * MOST_ISSUED + n_issued


def needed_at(
    ready_at: float, distance: int, dense_layer_s: float, layer_experts_s: float
) -> float:
    """Return when a layer is expected to demand its experts, if nothing stalls before it.

    Args:
        ready_at: when the present layer will be done.
        distance: how many layers further the layer is.
        dense_layer_s: what a layer takes before it demands them.
        layer_experts_s: what the experts of a layer take.
    """
    return ready_at + distance * dense_layer_s + (distance - 1) * layer_experts_s


def expected_gain_s(
    probability: float, begins_at: float, needed_at_s: float, load_s: float, chunk_s: float
) -> float:
    """Return the seconds a prefetch is expected to save; one that is not worth it gives 0 or less.

    A right prediction saves as much of the load as its chunks carry until the expert is demanded.
    A wrong one that is still on its way then costs the chunk that is under way.

    Args:
        probability: that the expert will be needed.
        begins_at: when the link can begin.
        needed_at_s: when its layer will demand it.
        load_s: seconds of a load.
        chunk_s: seconds of each chunk of the same expert, which may together take longer.
    """
    idle_s, ahead_s = needed_at_s - begins_at, N_CHUNKS * chunk_s
    if idle_s <= 0:
        return 0.0
    if idle_s >= ahead_s:
        return probability * load_s
    return probability * load_s * idle_s / ahead_s - (1 - probability) * chunk_s
