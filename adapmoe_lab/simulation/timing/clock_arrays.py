"""The arrays that the compiled clock reads and writes, by name.

What it only reads comes in named tuples of arrays. What it changes one number at a time is an array
whose places are named here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NOW, LINK_FREE, N_ISSUED, N_BYTES, LINK_S, N_LOGGED = range(6)
"""Places in the clock: the time, when the link is free, how many prefetches were issued, the bytes
that crossed and the seconds they took, the events written down."""

SECONDS, BYTES = range(2)
"""Places in the cost of a load."""

LAYER, MEMBER, BEGUN, ISSUED_AT, PRIORITY, ARRIVAL = range(6)
"""Places in an entry of the prefetch buffer: its layer, -1 if it is free, and expert; chunks begun;
when it was issued; its priority; when the last chunk begun arrives."""


class ExpertSets(NamedTuple):
    """What every step needs: the members of each set, and what becomes of each."""

    members: NDArray[np.int16]
    """[L, T K], the sets of each layer one after another, as `expert_sets` gives them."""
    starts: NDArray[np.int32]
    """[L, N+1], where each set begins, and the last one ends."""
    outcomes: NDArray[np.int8]
    """[L, T K], `HIT`, `LOAD` or `STREAM`."""


class Predictions(NamedTuple):
    """What J predictors predict of every step and layer."""

    hook_points: NDArray[np.int64]
    """[J], where each is queried."""
    distances: NDArray[np.int64]
    """[J], about which layer, counted from the one that is queried at."""
    experts: NDArray[np.int16]
    """[J, N, L, C], candidates, -1 for none."""
    probability: NDArray[np.float64]
    """[J, N or 1, L, C], that each is needed."""
    absent: NDArray[np.bool_]
    """[J, N, L, C], which were not resident when they were predicted."""


class Loads(NamedTuple):
    """Seconds and bytes of loads, as `StepCosts` gives them."""

    remaining: NDArray[np.float64]
    """[L, E, P+1, 2], of what is left of an expert when so many chunks were begun."""
    chunk: NDArray[np.float64]
    """[L, E, P, 2], of each chunk."""


class ClockState(NamedTuple):
    """What the clock keeps."""

    clock: NDArray[np.float64]
    """[6], the places named above."""
    entries: NDArray[np.float64]
    """[S, 6], the prefetch buffer."""
    entry_of: NDArray[np.int64]
    """[M], the entry of each member of the present set, or -1."""
    arrives: NDArray[np.float64]
    """[M], when each missing member arrives."""


class Accounts(NamedTuple):
    """What the clock fills in, of N steps and L layers; see `Timeline`."""

    used: NDArray[np.int16]
    wasted: NDArray[np.int16]
    stall_s: NDArray[np.float64]
    n_bytes: NDArray[np.int64]
    link_s: NDArray[np.float64]
    ended_s: NDArray[np.float64]


def empty_clock(n_entries: int, max_set_size: int) -> ClockState:
    """Return a clock at zero, with an empty buffer of so many entries."""
    entries = np.zeros((n_entries, 6))
    entries[:, LAYER] = -1
    return ClockState(np.zeros(6), entries, np.full(max_set_size, -1), np.zeros(max_set_size))


def empty_accounts(n_steps: int, n_layers: int) -> Accounts:
    """Return accounts of so many steps with nothing in them."""
    shape = n_steps, n_layers
    return Accounts(
        used=np.zeros(shape, np.int16),
        wasted=np.zeros(shape, np.int16),
        stall_s=np.zeros(shape),
        n_bytes=np.zeros(n_steps, np.int64),
        link_s=np.zeros(n_steps),
        ended_s=np.zeros(n_steps),
    )
