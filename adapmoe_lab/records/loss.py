"""What a loss run measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records.files import RecordError, fields_of, frozen_array


@dataclass(frozen=True, eq=False)
class LossReport:
    """Next-token loss of a model on texts, kept per sequence so that differences can be paired.

    Attributes:
        nats: float64 [S], summed loss of each sequence in nats.
        n_predicted: int64 [S], predicted tokens of each sequence.
        skipped_fraction: skipped expert activations over all the router chose.
        texts: digest of the token ids, so that only equal texts are compared.
    """

    nats: NDArray[np.float64]
    n_predicted: NDArray[np.int64]
    skipped_fraction: float
    texts: str

    def __post_init__(self) -> None:
        """Freeze the arrays and refuse a loss that is not finite."""
        nats = frozen_array("nats", self.nats, np.float64, (None,))
        wrong = np.flatnonzero(~np.isfinite(nats))
        if len(wrong):
            raise RecordError(
                f"The loss of {len(wrong)} of {len(nats)} texts is not finite, first that of text "
                f"{wrong[0]}, {nats[wrong[0]]}. Compute in wider numbers, as with "
                'lab.load(..., dtype="float32"), or leave the text out.'
            )
        object.__setattr__(self, "nats", nats)
        counts = frozen_array("n_predicted", self.n_predicted, np.int64, nats.shape)
        object.__setattr__(self, "n_predicted", counts)

    @property
    def nats_per_token(self) -> float:
        """Mean loss over predicted tokens."""
        return float(self.nats.sum() / self.n_predicted.sum())

    def increase_over(self, baseline: LossReport) -> tuple[float, float | None]:
        """Return the loss increase in nats per token and its standard error, paired by sequence.

        One sequence has no standard error: None, not known.

        Raises:
            RecordError: the two reports are on different texts.
        """
        if self.texts != baseline.texts:
            raise RecordError(
                "Loss can only be compared on the same texts: this report and the baseline were "
                "measured on different tokens. Measure both on one list of texts."
            )
        weights = self.n_predicted / self.n_predicted.sum()
        differences = (self.nats - baseline.nats) / self.n_predicted
        mean = float((weights * differences).sum())
        n = len(differences)
        if n < 2:
            return mean, None
        variance = float((weights**2 * (differences - mean) ** 2).sum() * n / (n - 1))
        return mean, variance**0.5

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that `from_json` reads back."""
        return {
            "nats": self.nats.tolist(),
            "n_predicted": self.n_predicted.tolist(),
            "skipped_fraction": self.skipped_fraction,
            "texts": self.texts,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str = "The loss report") -> LossReport:
        """Build a report from what `to_json` returned.

        Raises:
            RecordError: a value is unknown, missing or wrong; the text names `source`.
        """
        return cls(**fields_of(cls, values, source))
