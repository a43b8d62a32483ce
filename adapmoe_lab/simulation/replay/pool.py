"""What a replay of one pool of slots reads, keeps and fills in: arrays by name.

The compiled loops take these as they are. Nothing here imports numba.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.eviction.policy import PROTECTED


class Steps(NamedTuple):
    """What every step of a pool's layers needs; N steps, L layers of the pool, T tokens.

    Attributes:
        bounds: int64 [N+1], first token of every step, and T.
        members: int16 [L, T K], the sets of each layer one after another, as `expert_sets` gives
            them.
        starts: int32 [L, N+1], where each set begins.
        oracle_inputs: int32 [L, T K], the policy's oracle input of each use; empty without one.
        first_layer: number of the pool's first layer among the model's.
    """

    bounds: NDArray[np.int64]
    members: NDArray[np.int16]
    starts: NDArray[np.int32]
    oracle_inputs: NDArray[np.int32]
    first_layer: Any

    def layers(self, own: slice) -> Steps:
        """Return the steps of some of these layers."""
        members, starts, inputs = self.members[own], self.starts[own], self.oracle_inputs[own]
        return Steps(self.bounds, members, starts, inputs, self.first_layer + own.start)


class Scores(NamedTuple):
    """The router's scores of a trace.

    Attributes:
        bits: uint16 [T, L of the model, E], as the bits of float16.
        fixed: int32 [65536], `FIXED_SCORES`.
    """

    bits: NDArray[np.uint16]
    fixed: NDArray[np.int32]


class Predicted(NamedTuple):
    """What J predictors predicted, and whether it was resident then.

    Attributes:
        distances: int64 [J], from how many layers before a layer's experts are predicted; 0 for
            before the pass begins.
        experts: int16 [J, N, L of the model, C], the candidates, -1 for none.
        absent: bool [J, N, L of the model, C], filled with which of them are not resident when they
            are predicted.
    """

    distances: NDArray[np.int64]
    experts: NDArray[np.int16]
    absent: NDArray[np.bool_]


class Pool(NamedTuple):
    """What a pool keeps of its layers' experts.

    Attributes:
        pinned: bool [L, E], experts that never leave.
        priorities: int64 [L, E], by which the others leave.
        states: int64 [L, E], what else the policy keeps.
        resident: bool [L, E], which experts have a slot.
        protected: int64 [L, E], 0 for an expert that may leave, `PROTECTED` for one that may not.
        penalty: int64 [L], what a layer's priorities lose until its next step, counted from the
            pass's beginning: what all of them lose does not matter.
        lowest: int64 [L], each layer's expert that would leave first.
        lowest_key: int64 [L up to a multiple of four], its priority less the penalty; `PROTECTED`
            where there is none.
        missing: int64 [E+1], room for the missing experts of a step.
        scores: int64 [E], room for the scores of a step.
    """

    pinned: NDArray[np.bool_]
    priorities: NDArray[np.int64]
    states: NDArray[np.int64]
    resident: NDArray[np.bool_]
    protected: NDArray[np.int64]
    penalty: NDArray[np.int64]
    lowest: NDArray[np.int64]
    lowest_key: NDArray[np.int64]
    missing: NDArray[np.int64]
    scores: NDArray[np.int64]


def empty_pool(pinned: NDArray[np.bool_]) -> Pool:
    """Return a pool in which no expert is resident and these [L, E] never leave."""
    n_layers, n_experts = pinned.shape
    return Pool(
        pinned=pinned,
        priorities=np.zeros(pinned.shape, dtype=np.int64),
        states=np.zeros(pinned.shape, dtype=np.int64),
        resident=np.zeros(pinned.shape, dtype=np.bool_),
        protected=np.full(pinned.shape, PROTECTED),
        penalty=np.zeros(n_layers, dtype=np.int64),
        lowest=np.full(n_layers, -1),
        lowest_key=np.full(n_layers + -n_layers % 4, PROTECTED),
        missing=np.zeros(n_experts + 1, dtype=np.int64),
        scores=np.zeros(n_experts, dtype=np.int64),
    )
