"""What skipping experts costs, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.records.files import RecordError, frozen_array, load_arrays, save_arrays

KIND = "sensitivity-profile"
SCHEMA_VERSION = 1
ARRAYS = ("cost", "standard_error", "cuts", "increase_nats", "increase_se")
SCALARS = ("model_fingerprint", "estimator", "n_tokens", "n_sequences", "scale", "scale_se")


@dataclass(frozen=True, eq=False)
class SensitivityProfile:
    """Sensitivity of the loss to each layer's experts, with standard errors over sequences.

    Attributes:
        model_fingerprint: the model it was measured on.
        estimator: name of the estimator of `cost`.
        cost: float64 [L], loss cost per layer; for `fisher`, mean ||dL/dy_l||^2 over tokens.
        standard_error: float64 [L], of `cost`.
        n_tokens: tokens used.
        n_sequences: sequences used.
        cuts: float64 [B], ascending cuts on the share.
        increase_nats: float64 [L, B], second-order estimate of the loss increase in nats per
            token when that layer alone skips at `cuts[b]`, without renormalisation.
        increase_se: float64 [L, B], its standard error.
        scale: measured over estimated increase at one reference gating; 1 if not measured.
        scale_se: standard error of `scale`; 0 if not measured.
    """

    model_fingerprint: str
    estimator: str
    cost: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    n_tokens: int
    n_sequences: int
    cuts: NDArray[np.float64]
    increase_nats: NDArray[np.float64]
    increase_se: NDArray[np.float64]
    scale: float = 1.0
    scale_se: float = 0.0

    def __post_init__(self) -> None:
        """Freeze the arrays and check their shapes."""
        n_layers, n_cuts = len(self.cost), len(self.cuts)
        for name, shape in (
            ("cost", (n_layers,)),
            ("standard_error", (n_layers,)),
            ("cuts", (n_cuts,)),
            ("increase_nats", (n_layers, n_cuts)),
            ("increase_se", (n_layers, n_cuts)),
        ):
            array = frozen_array(name, getattr(self, name), np.float64, shape)
            object.__setattr__(self, name, array)
        if n_cuts < 2 or (np.diff(self.cuts) <= 0).any():
            raise RecordError("cuts must hold at least two values in ascending order.")

    @property
    def n_layers(self) -> int:
        """L, the number of layers."""
        return len(self.cost)

    def increase(self, cuts: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the predicted loss increase of each layer [L] at one cut per layer [L].

        In nats per token, scaled by the measured reference; second value: standard errors.
        """
        cuts = np.asarray(cuts, dtype=np.float64)
        layers = range(self.n_layers)
        mean = np.array([np.interp(cuts[i], self.cuts, self.increase_nats[i]) for i in layers])
        error = np.array([np.interp(cuts[i], self.cuts, self.increase_se[i]) for i in layers])
        off = cuts > 1
        mean, error = np.where(off, 0.0, mean), np.where(off, 0.0, error)
        return mean * self.scale, np.hypot(error * self.scale, mean * self.scale_se)

    def save(self, path: str | Path) -> Path:
        """Write the profile to one .npz file, whole or not at all, and return its path."""
        path = Path(path)
        header = {name: getattr(self, name) for name in SCALARS}
        arrays = {name: getattr(self, name) for name in ARRAYS}
        save_arrays(path, KIND, SCHEMA_VERSION, header, arrays)
        return path

    @classmethod
    def load(cls, path: str | Path) -> SensitivityProfile:
        """Read a saved profile.

        Raises:
            FileNotFoundError: there is no such file.
            RecordError: damaged, or of another kind or version.
        """
        header, arrays = load_arrays(Path(path), KIND, SCHEMA_VERSION)
        values: dict[str, Any] = {name: header[name] for name in SCALARS} | arrays
        return cls(**values)
