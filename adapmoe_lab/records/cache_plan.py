"""How much room each layer has for experts on the device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records.files import RecordError, digest, fields_of, frozen_array

LATER = ("is_global", "pinned")
"""What plans had not before slots could be shared and experts pinned."""


@dataclass(frozen=True, eq=False)
class CachePlan:
    """Slots per layer, or shared by all layers, under a byte budget.

    Attributes:
        slots: int64 [L], experts a layer can hold on the device; zero streams every expert. In a
            global pool only their sum counts.
        slot_bytes: int64 [L], bytes of one slot (the layer's widest stored expert; the widest of
            all in a global pool); None for a plan made without a model.
        budget_bytes: bytes the plan was made for, staging and surrogates included; None without a
            model.
        method: how the slots were divided.
        expected_loads: float64 [L] expected loads per token, where the method predicts them.
        is_global: whether the layers share all slots.
        pinned: ids of the experts of each layer that never leave, ascending, for eviction policies
            that keep pinned experts; None for the others.
    """

    slots: NDArray[np.int64]
    slot_bytes: NDArray[np.int64] | None
    budget_bytes: int | None
    method: str
    expected_loads: NDArray[np.float64] | None = None
    is_global: bool = False
    pinned: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        """Freeze the arrays and check them."""
        slots = frozen_array("slots", self.slots, np.int64, (None,))
        if (slots < 0).any():
            raise RecordError("slots must not be negative.")
        object.__setattr__(self, "slots", slots)
        for name, dtype in (("slot_bytes", np.int64), ("expected_loads", np.float64)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, frozen_array(name, value, dtype, slots.shape))
        if self.pinned is not None:
            pinned = tuple(tuple(sorted(set(map(int, layer)))) for layer in self.pinned)
            object.__setattr__(self, "pinned", pinned)
            self._check_pinned(pinned)

    def _check_pinned(self, pinned: tuple[tuple[int, ...], ...]) -> None:
        if len(pinned) != len(self.slots):
            raise RecordError(
                f"pinned must name experts for {len(self.slots)} layers, got {len(pinned)}."
            )
        counts = np.array([len(layer) for layer in pinned])
        room = counts.sum() <= self.n_slots if self.is_global else (counts <= self.slots).all()
        if not room:
            raise RecordError(
                f"{counts.sum()} pinned experts do not fit the plan's {self.n_slots} slots"
                + (
                    "."
                    if self.is_global
                    else f" {self.slots.tolist()}, by layer {counts.tolist()}."
                )
                + " Pin fewer, or plan more slots."
            )

    @property
    def n_slots(self) -> int:
        """Slots of all layers together."""
        return int(self.slots.sum())

    @property
    def n_pools(self) -> int:
        """Number of sets of slots that layers do not share with others."""
        return 1 if self.is_global else len(self.slots)

    def holds_all(self, n_experts: int) -> bool:
        """Whether every expert of layers of `n_experts` has a slot, so that none ever streams."""
        needed = n_experts * len(self.slots) if self.is_global else n_experts
        return all(self.pool_slots(pool) >= needed for pool in range(self.n_pools))

    def pool_slots(self, pool: int) -> int:
        """Return the number of slots of a pool."""
        return self.n_slots if self.is_global else int(self.slots[pool])

    def pinned_mask(self, n_experts: int) -> NDArray[np.bool_]:
        """Return which experts never leave, bool [L, E]."""
        mask = np.zeros((len(self.slots), n_experts), dtype=np.bool_)
        for layer, experts in enumerate(self.pinned or ()):
            mask[layer, list(experts)] = True
        return mask

    def fingerprint(self) -> str:
        """Identify the slots of every layer and the pinned experts; not how they were chosen."""
        slots = self.n_slots if self.is_global else self.slots.tolist()
        return digest(json.dumps([self.is_global, slots, self.pinned]))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that `from_json` reads back."""
        return {
            "slots": self.slots.tolist(),
            "slot_bytes": None if self.slot_bytes is None else self.slot_bytes.tolist(),
            "budget_bytes": self.budget_bytes,
            "method": self.method,
            "expected_loads": None if self.expected_loads is None else self.expected_loads.tolist(),
            "is_global": self.is_global,
            "pinned": None if self.pinned is None else [list(layer) for layer in self.pinned],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str = "The cache plan") -> CachePlan:
        """Build a plan from what `to_json` returned.

        Raises:
            RecordError: a value is unknown, missing or wrong; the text names `source`.
        """
        return cls(**fields_of(cls, values, source, LATER))
