"""Expert traffic: what was requested, what was resident, and what crossed the link."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records.files import fields_of, frozen_array


@dataclass(frozen=True, eq=False)
class Traffic:
    """Counters of some forward passes; two of them can be added and subtracted.

    Attributes:
        hits: int64 [L], distinct experts found resident.
        misses: int64 [L], distinct experts that had to be demanded, streamed ones included.
        n_steps: forward passes counted.
        bytes_moved: bytes of experts brought to the device.
        kept: expert activations computed.
        skipped: expert activations the gating skipped.
        prefetch_used: int64 [L], distinct experts that were not resident but whose prefetch was
            begun.
        prefetch_wasted: int64 [L], prefetches begun whose experts were not needed.
    """

    hits: NDArray[np.int64]
    misses: NDArray[np.int64]
    n_steps: int
    bytes_moved: int
    kept: int
    skipped: int
    prefetch_used: NDArray[np.int64]
    prefetch_wasted: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Freeze the counters."""
        hits = frozen_array("hits", self.hits, np.int64, (None,))
        object.__setattr__(self, "hits", hits)
        for name in ("misses", "prefetch_used", "prefetch_wasted"):
            counted = frozen_array(name, getattr(self, name), np.int64, hits.shape)
            object.__setattr__(self, name, counted)

    @property
    def hit_rate(self) -> float:
        """Share of distinct experts that were resident when requested."""
        requested = self.hits.sum() + self.misses.sum() + self.prefetch_used.sum()
        return float(self.hits.sum() / max(1, requested))

    @property
    def skipped_fraction(self) -> float:
        """Skipped expert activations over all the router chose."""
        return self.skipped / max(1, self.kept + self.skipped)

    def __add__(self, other: Traffic) -> Traffic:
        """Return the traffic of both."""
        return Traffic(**{name: getattr(self, name) + getattr(other, name) for name in FIELDS})

    def __sub__(self, earlier: Traffic) -> Traffic:
        """Return what was added after an earlier reading."""
        return Traffic(**{name: getattr(self, name) - getattr(earlier, name) for name in FIELDS})

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that `from_json` reads back."""
        values = {name: getattr(self, name) for name in FIELDS}
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in values.items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str = "The traffic") -> Traffic:
        """Build counters from what `to_json` returned.

        Raises:
            RecordError: a value is unknown, missing or wrong; the text names `source`.
        """
        return cls(**fields_of(cls, values, source))


FIELDS = tuple(Traffic.__dataclass_fields__)
