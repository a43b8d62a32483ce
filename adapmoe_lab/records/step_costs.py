"""What the parts of a forward pass take: one set of costs for the probe, the engine and simulation.

A new cost of a pass is a field of `HostCosts` and, if a machine is probed for it, a field of that
name in `HardwareProfile`, which then measures, saves and prints it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records.files import RecordError, frozen_array

N_CHUNKS = 4
"""P, chunks in which an expert that is prefetched crosses the link."""


def chunk_bounds(n_bytes: int) -> list[int]:
    """Return where the chunks of an expert begin, and the last one ends, in bytes [P+1]."""
    return [n_bytes * chunk // N_CHUNKS for chunk in range(N_CHUNKS + 1)]


class HostCosts(NamedTuple):
    """Seconds of a forward pass beside the experts and the link; what is not known takes none.

    A named tuple, so that compiled loops read each cost by its name.
    """

    dense_layer_s: float = 0.0
    """A layer before it requests its experts: attention, router, gate, and what the host does."""
    head_s: float = 0.0
    """What follows the last layer."""
    miss_s: float = 0.0
    """The host's part of each demand, and of moving a prefetched expert to its slot."""
    wait_s: float = 0.0
    """What a layer takes more for having waited for the link. If less, the host works on meanwhile:
    at most as long as the layer waited and as a layer takes before its experts, and not at all
    where a predictor reads the layer's output, for which the host waits."""
    predict_s: float = 0.0
    """The host's part of querying a predictor about one layer."""
    chunk_s: float = 0.0
    """The host's part of each chunk of a prefetch."""
    predict_overhead_s: float = 0.0
    """A hook point at which any predictor is queried, beside the queries themselves."""
    predict_output_overhead_s: float = 0.0
    """What such a hook point takes more if it is a layer's output."""


@dataclass(frozen=True, eq=False)
class StepCosts:
    """What a forward pass takes on the host, in its experts and on the link.

    Attributes:
        host: seconds beside the experts and the link.
        expert_s: float64 [L, E], seconds of each resident expert; [] if all take the same.
        load_s: returns the seconds that the link takes for a number of bytes; None if only the
            link itself can tell.
        expert_bytes: int64 [L, E], stored bytes of each expert; None where no table of loads is
            needed.
    """

    host: HostCosts = field(default_factory=HostCosts)
    expert_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(()))
    load_s: Callable[[float], float] | None = None
    expert_bytes: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        """Freeze the arrays and check that they are of the same experts."""
        object.__setattr__(self, "host", HostCosts(*map(float, self.host)))
        expert_s = np.asarray(self.expert_s, dtype=np.float64)
        shape: tuple[int | None, ...] = (None, None) if expert_s.ndim else ()
        if self.expert_bytes is not None:
            sizes = frozen_array("expert_bytes", self.expert_bytes, np.int64, (None, None))
            object.__setattr__(self, "expert_bytes", sizes)
            shape = sizes.shape
            expert_s = expert_s if expert_s.ndim else np.broadcast_to(expert_s, sizes.shape)
        object.__setattr__(self, "expert_s", frozen_array("expert_s", expert_s, np.float64, shape))

    def of_expert(self, layer: int, expert: int) -> float:
        """Return the seconds of one resident expert."""
        return float(self.expert_s[layer, expert] if self.expert_s.ndim else self.expert_s)

    @cached_property
    def remaining_loads(self) -> NDArray[np.float64]:
        """Seconds and bytes to bring what is left of an expert, float64 [L, E, P+1, 2].

        The third axis is how many of its P chunks were begun before.
        """
        table = self._by_size(lambda bounds: [bounds[-1] - begun for begun in bounds])
        table[:, :, N_CHUNKS] = 0.0  # nothing is left, so that the link is not even begun
        table.flags.writeable = False
        return table

    @cached_property
    def chunk_loads(self) -> NDArray[np.float64]:
        """Seconds and bytes of each chunk of an expert, float64 [L, E, P, 2]."""
        table = self._by_size(lambda bounds: np.diff(bounds).tolist())
        table.flags.writeable = False
        return table

    def _by_size(self, parts: Callable[[list[int]], list[int]]) -> NDArray[np.float64]:
        """Return seconds and bytes of the parts of every expert, from its chunks' bounds."""
        sizes, load_s = self.expert_bytes, self.load_s
        if sizes is None or load_s is None:
            raise RecordError(
                "A table of loads needs the bytes of every expert and what the link takes for "
                "them; give StepCosts(..., load_s=..., expert_bytes=...)."
            )
        table = np.zeros((*sizes.shape, len(parts(chunk_bounds(0))), 2))
        for size in np.unique(sizes).tolist():
            table[sizes == size] = [(load_s(n), n) for n in parts(chunk_bounds(size))]
        return table
