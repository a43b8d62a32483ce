"""The time one layer takes for its experts, when misses cross one link in order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.allocation import N_STAGING


def layer_step_s(
    hits: NDArray[np.int64],
    loads: NDArray[np.int64],
    streamed: NDArray[np.int64],
    load_s: NDArray[np.float64],
    expert_s: float,
) -> NDArray[np.float64]:
    """Return the seconds of the expert part of each step and layer, float64 [N, L].

    The link brings one expert at a time, `load_s` [L] each: first those that get a slot, then
    those that stream through two staging slots, the third and later of which must wait for the
    slot of the one two before to be read. The resident experts run meanwhile; each loaded one
    runs as soon as it is there and the one before it is done.
    """
    elapsed = np.asarray(hits * expert_s, dtype=np.float64)
    link_free = np.zeros(elapsed.shape)
    finished = [link_free, link_free]  # when the expert two before, and the one before, were done
    for arrived in range(1, int((loads + streamed).max(initial=0)) + 1):
        waits_for_slot = arrived > loads + N_STAGING
        link_free = np.maximum(link_free, np.where(waits_for_slot, finished[0], 0.0)) + load_s
        done = np.maximum(elapsed, link_free) + expert_s
        np.copyto(elapsed, done, where=arrived <= loads + streamed)
        finished = [finished[1], done]
    return elapsed
