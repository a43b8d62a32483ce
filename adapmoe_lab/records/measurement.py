"""A measured quantity with its raw samples and the conditions it was taken under."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records.files import RecordError, fields_of, frozen_array


class IncomparableError(ValueError):
    """Two measurements were taken under unlike conditions."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """Raw samples of one quantity.

    Attributes:
        samples: float64 [n], in the order they were taken, warm-up left out.
        unit: unit of the samples, such as `s` or `nats`.
        warmup: samples taken before and not kept.
        conditions: everything that must be alike for a comparison to mean something; kept as plain
            JSON values, so that what was saved compares with what was not.
    """

    samples: NDArray[np.float64]
    unit: str
    warmup: int = 0
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Freeze the samples and refuse an empty measurement."""
        samples = frozen_array("samples", self.samples, np.float64, (None,))
        if not len(samples) or not np.isfinite(samples).all():
            raise RecordError("A measurement needs at least one sample, all of them finite.")
        object.__setattr__(self, "samples", samples)
        object.__setattr__(self, "conditions", MappingProxyType(_plain(self.conditions)))

    @property
    def median(self) -> float:
        """Median of the samples."""
        return float(np.median(self.samples))

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile of the samples."""
        low, high = np.percentile(self.samples, [25, 75])
        return float(low), float(high)

    def ratio_to(self, other: Measurement, varied: Collection[str] = ()) -> float:
        """Return this median over the other's.

        Args:
            other: the measurement to divide by.
            varied: names of conditions that differ on purpose.

        Raises:
            IncomparableError: the unit or a condition outside `varied` differs.
        """
        if self.unit != other.unit:
            raise IncomparableError(f"Cannot compare {self.unit!r} with {other.unit!r}.")
        names = (set(self.conditions) | set(other.conditions)) - set(varied)
        unlike = sorted(n for n in names if self.conditions.get(n) != other.conditions.get(n))
        if unlike:
            unlike = "; ".join(
                f"{n}: {self.conditions.get(n)!r} against {other.conditions.get(n)!r}"
                for n in unlike
            )
            raise IncomparableError(
                f"The measurements were taken under unlike conditions ({unlike}). Measure both "
                "under the same conditions, or name what was varied on purpose in `varied`."
            )
        return self.median / other.median

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that `from_json` reads back."""
        return {
            "samples": self.samples.tolist(),
            "unit": self.unit,
            "warmup": self.warmup,
            "conditions": dict(self.conditions),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str = "The measurement") -> Measurement:
        """Build a measurement from what `to_json` returned.

        Raises:
            RecordError: a value is unknown, missing or wrong; the text names `source`.
        """
        return cls(**fields_of(cls, values, source))


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back: dicts with text keys, lists, plain numbers."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
