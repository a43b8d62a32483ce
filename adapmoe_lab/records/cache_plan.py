"""How much room each layer has for experts on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records.files import RecordError, frozen_array


@dataclass(frozen=True, eq=False)
class CachePlan:
    """Slots per layer under a byte budget.

    Attributes:
        slots: int64 [L], experts a layer can hold on the device; zero streams every expert.
        slot_bytes: int64 [L], bytes of one slot (the layer's widest stored expert).
        budget_bytes: bytes the plan was made for, staging and surrogates included.
        method: how the slots were divided.
        expected_loads: float64 [L] expected loads per token, where the method predicts them.
    """

    slots: NDArray[np.int64]
    slot_bytes: NDArray[np.int64]
    budget_bytes: int
    method: str
    expected_loads: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        """Freeze the arrays and check them."""
        slots = frozen_array("slots", self.slots, np.int64, (None,))
        if (slots < 0).any():
            raise RecordError("slots must not be negative.")
        object.__setattr__(self, "slots", slots)
        n_layers = slots.shape
        slot_bytes = frozen_array("slot_bytes", self.slot_bytes, np.int64, n_layers)
        object.__setattr__(self, "slot_bytes", slot_bytes)
        if self.expected_loads is not None:
            loads = frozen_array("expected_loads", self.expected_loads, np.float64, n_layers)
            object.__setattr__(self, "expected_loads", loads)

    @property
    def n_slots(self) -> int:
        """Slots of all layers together."""
        return int(self.slots.sum())

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that `from_json` reads back."""
        return {
            "slots": self.slots.tolist(),
            "slot_bytes": self.slot_bytes.tolist(),
            "budget_bytes": self.budget_bytes,
            "method": self.method,
            "expected_loads": None if self.expected_loads is None else self.expected_loads.tolist(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CachePlan:
        """Build a plan from what `to_json` returned."""
        return cls(**values)
