"""What the machine was measured to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records.files import RecordError, frozen_array


@dataclass(frozen=True, eq=False)
class HardwareProfile:
    """Measured times of one decode step's parts, at batch 1.

    Attributes:
        device: name of the compute device.
        link: what experts travel over: `pcie`, or `emulated:<target>`.
        copy_bytes: int64 [n] ascending sizes copied from host to device.
        copy_s: float64 [n] median seconds of a copy of that size.
        dense_step_s: seconds of one decode step outside the experts.
        expert_s: seconds one resident expert takes for one token.
        conditions: what else the numbers depend on (versions, threads, target, dtype).
    """

    device: str
    link: str
    copy_bytes: NDArray[np.int64]
    copy_s: NDArray[np.float64]
    dense_step_s: float
    expert_s: float
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Freeze the arrays and check that times are positive."""
        sizes = frozen_array("copy_bytes", self.copy_bytes, np.int64, (None,))
        times = frozen_array("copy_s", self.copy_s, np.float64, sizes.shape)
        if not len(sizes) or (np.diff(sizes) <= 0).any():
            raise RecordError("copy_bytes must hold at least one size, in ascending order.")
        if (times < 0).any() or self.dense_step_s < 0 or self.expert_s < 0:
            raise RecordError("A hardware profile cannot hold negative times.")
        object.__setattr__(self, "copy_bytes", sizes)
        object.__setattr__(self, "copy_s", times)
        object.__setattr__(self, "conditions", MappingProxyType(dict(self.conditions)))

    @property
    def is_emulated(self) -> bool:
        """Whether the link is emulated rather than a real bus."""
        return self.link.startswith("emulated:")

    def load_s(self, n_bytes: float) -> float:
        """Seconds to bring `n_bytes` to the device, interpolated between measured sizes."""
        if n_bytes >= self.copy_bytes[-1]:
            return float(self.copy_s[-1] * n_bytes / self.copy_bytes[-1])
        return float(np.interp(n_bytes, self.copy_bytes, self.copy_s))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that `from_json` reads back."""
        return {
            "device": self.device,
            "link": self.link,
            "copy_bytes": self.copy_bytes.tolist(),
            "copy_s": self.copy_s.tolist(),
            "dense_step_s": self.dense_step_s,
            "expert_s": self.expert_s,
            "conditions": dict(self.conditions),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HardwareProfile:
        """Build a profile from what `to_json` returned."""
        return cls(**values)
