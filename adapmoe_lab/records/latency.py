"""What a latency run measured: time and traffic, prefill apart from decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records.files import frozen_array
from adapmoe_lab.records.measurement import Measurement


@dataclass(frozen=True, eq=False)
class PhaseTraffic:
    """Expert traffic of one phase, summed over the measured runs.

    Attributes:
        hits: int64 [L], distinct experts found resident.
        misses: int64 [L], distinct experts loaded, streamed ones included.
        n_steps: forward passes counted.
        bytes_moved: bytes of experts brought to the device.
        kept: expert activations computed.
        skipped: expert activations the gating skipped.
    """

    hits: NDArray[np.int64]
    misses: NDArray[np.int64]
    n_steps: int
    bytes_moved: int
    kept: int
    skipped: int

    def __post_init__(self) -> None:
        """Freeze the counters."""
        hits = frozen_array("hits", self.hits, np.int64, (None,))
        object.__setattr__(self, "hits", hits)
        misses = frozen_array("misses", self.misses, np.int64, hits.shape)
        object.__setattr__(self, "misses", misses)

    @property
    def hit_rate(self) -> float:
        """Share of distinct experts that were resident when asked for."""
        return float(self.hits.sum() / max(1, self.hits.sum() + self.misses.sum()))

    @property
    def skipped_fraction(self) -> float:
        """Skipped expert activations over all the router chose."""
        return self.skipped / max(1, self.kept + self.skipped)

    def __add__(self, other: PhaseTraffic) -> PhaseTraffic:
        """Return the traffic of both."""
        return PhaseTraffic(
            **{
                name: getattr(self, name) + getattr(other, name)
                for name in self.__dataclass_fields__
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "hits": self.hits.tolist(),
            "misses": self.misses.tolist(),
            "n_steps": self.n_steps,
            "bytes_moved": self.bytes_moved,
            "kept": self.kept,
            "skipped": self.skipped,
        }


@dataclass(frozen=True, eq=False)
class LatencyReport:
    """Measured latency of one configuration.

    Attributes:
        prefill: seconds per prompt.
        decode: seconds per output token of each run, averaged over the run's tokens.
        decode_steps: seconds of every single output token.
        prefill_traffic: expert traffic of the prompts.
        decode_traffic: expert traffic of the output tokens.
    """

    prefill: Measurement
    decode: Measurement
    decode_steps: Measurement
    prefill_traffic: PhaseTraffic
    decode_traffic: PhaseTraffic

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {name: getattr(self, name).to_json() for name in self.__dataclass_fields__}
