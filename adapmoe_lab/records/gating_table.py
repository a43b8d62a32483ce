"""The one form every gating policy takes before it runs: a table of cuts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records.files import RecordError, digest, fields_of, frozen_array

OFF = 2.0
"""A cut that nothing reaches: nothing is skipped."""

CUMULATIVE_SHARE = "cumulative_share"
SHORTFALL = "shortfall_to_best"
QUANTITIES = (CUMULATIVE_SHARE, SHORTFALL)


@dataclass(frozen=True, eq=False)
class GatingTable:
    """Cuts on a quantity that grows with every expert kept, per layer and number kept.

    A token keeps its m best experts, m the smallest number at which the quantity reaches
    `cuts[layer, m - 1]`; if it never does, all K. The quantity is the share that the m best hold
    together, or by how much the next one falls short of the best, 1 - share / best share.

    Attributes:
        cuts: float32 [L, K-1]; `OFF` (anything above one) never skips.
        renormalise: whether the kept weights are scaled back to the sum of all K.
        quantity: `cumulative_share` or `shortfall_to_best`.
    """

    cuts: NDArray[np.float32]
    renormalise: bool = False
    quantity: str = CUMULATIVE_SHARE

    def __post_init__(self) -> None:
        """Freeze the cuts and check their range."""
        cuts = np.array(self.cuts, dtype=np.float32)
        if not np.isfinite(cuts).all() or (cuts < 0).any():
            raise RecordError("Gating cuts must be finite and not negative; use OFF to skip none.")
        check_quantity(self.quantity)
        cuts = np.where(cuts > 1, np.float32(OFF), cuts)
        object.__setattr__(self, "cuts", frozen_array("cuts", cuts, np.float32, (None, None)))

    @classmethod
    def per_layer(cls, cuts: Any, top_k: int, renormalise: bool = False) -> GatingTable:
        """Build a table from one cut per layer [L], the same for every number kept."""
        column = np.asarray(cuts, dtype=np.float32)[:, None]
        return cls(np.repeat(column, top_k - 1, axis=1), renormalise)

    @property
    def is_one_cut_per_layer(self) -> bool:
        """Whether each layer has a single cut on the cumulative share, however many are kept."""
        return self.quantity == CUMULATIVE_SHARE and bool((self.cuts == self.cuts[:, :1]).all())

    @property
    def n_layers(self) -> int:
        """Number of layers the table covers."""
        return self.cuts.shape[0]

    @property
    def top_k(self) -> int:
        """Number of experts the router chooses."""
        return self.cuts.shape[1] + 1

    def fingerprint(self) -> str:
        """Identify the table by its values."""
        return digest(
            self.cuts.tobytes(), str(self.cuts.shape), str(self.renormalise), self.quantity
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a cut that is off becomes null."""
        cuts = [[None if cut > 1 else float(cut) for cut in row] for row in self.cuts]
        return {"quantity": self.quantity, "cuts": cuts, "renormalise": self.renormalise}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str = "The gating table") -> GatingTable:
        """Build a table from what `to_json` returned.

        Raises:
            RecordError: a value is unknown, missing or wrong; the text names `source`.
        """
        values = fields_of(cls, values, source)
        check_quantity(values["quantity"])
        rows = [[OFF if cut is None else cut for cut in row] for row in values["cuts"]]
        return cls(
            np.array(rows, dtype=np.float32), bool(values["renormalise"]), values["quantity"]
        )


def check_quantity(quantity: str) -> None:
    """Raise RecordError unless cuts can be on this quantity."""
    if quantity not in QUANTITIES:
        raise RecordError(
            f"Gating on {quantity!r} is unknown; expected one of {', '.join(QUANTITIES)}."
        )
