"""What skipping experts costs, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.records.files import (
    IDENTIFYING,
    RecordError,
    fields_of,
    frozen_array,
    load_arrays,
    save_arrays,
)
from adapmoe_lab.records.gating_table import OFF
from adapmoe_lab.records.spec import MoESpec
from adapmoe_lab.records.standard_error import none_if_unknown

KIND = "sensitivity-profile"
SCHEMA_VERSION = 4
ARRAYS = (
    "cost",
    "standard_error",
    "fisher",
    "fisher_se",
    "cuts",
    "increase_nats",
    "increase_se",
    "first_order",
    "first_order_se",
    "skipped",
    "anchors",
    "factor",
    "joint_error",
)
SCALARS = (
    "model_fingerprint",
    "estimator",
    "stand_in",
    "n_tokens",
    "n_sequences",
)
NOTHING = "nothing"
RENORMALISED = "renormalised"


@dataclass(frozen=True, eq=False)
class SensitivityProfile:
    """What skipping costs, layer by layer, with standard errors over sequences.

    One sequence has no standard error; arrays of errors then hold NaN.

    Attributes:
        model_fingerprint: the model it was measured on.
        estimator: name of the estimator, see `profiling.sensitivity.estimators`.
        stand_in: what took the place of a skipped expert: `nothing`, `renormalised`, or the
            fingerprint of the surrogates.
        n_tokens: tokens used.
        n_sequences: sequences used.
        cost: float64 [L], the estimator's sensitivity of each layer.
        standard_error: float64 [L], of `cost`.
        fisher: float64 [L], AdapMoE's S_l, mean ||dL/dy_l||^2 over tokens, whatever the estimator.
        fisher_se: float64 [L], its standard error.
        cuts: float64 [B], ascending cuts on the cumulative share.
        increase_nats: float64 [L, B], estimated loss increase in nats per token when that layer
            alone skips at `cuts[b]`.
        increase_se: float64 [L, B], its standard error.
        first_order: float64 [L, B], the part of the loss increase that the curves leave out and
            that layers add to each other: mean gradient times change; zero if they leave out none.
            It is not zero on average, as the model's probabilities are not those of the texts.
        first_order_se: float64 [L, B], its standard error.
        skipped: float64 [L, B], share of the layer's expert activations that `cuts[b]` skips.
        anchors: float64 [A, 3], settings in which all layers skipped at once, by what the curves
            add up to: that sum, the Kullback-Leibler divergence from the ungated model measured
            there, and its standard error, in nats per token. A is 0 if the estimate is not
            anchored.
        factor: float64 [A], how much of the curves' sum the measured loss increase has beside its
            first-order part.
        joint_error: float64 [A], standard error of the measured loss increase over what it would
            be if layers erred independently of each other.
    """

    model_fingerprint: str
    estimator: str
    stand_in: str
    n_tokens: int
    n_sequences: int
    cost: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    fisher: NDArray[np.float64]
    fisher_se: NDArray[np.float64]
    cuts: NDArray[np.float64]
    increase_nats: NDArray[np.float64]
    increase_se: NDArray[np.float64]
    first_order: NDArray[np.float64]
    first_order_se: NDArray[np.float64]
    skipped: NDArray[np.float64]
    anchors: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 3)))
    factor: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    joint_error: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        """Freeze the arrays and check their shapes."""
        n_layers, n_cuts = len(self.cost), len(self.cuts)
        shapes = dict.fromkeys(("cost", "standard_error", "fisher", "fisher_se"), (n_layers,))
        by_cut = ("increase_nats", "increase_se", "first_order", "first_order_se", "skipped")
        shapes |= dict.fromkeys(by_cut, (n_layers, n_cuts))
        shapes |= {"cuts": (n_cuts,), "anchors": (None, 3)}
        shapes |= dict.fromkeys(("factor", "joint_error"), (len(self.anchors),))
        for name, shape in shapes.items():
            array = frozen_array(name, getattr(self, name), np.float64, shape)
            object.__setattr__(self, name, array)
        if n_cuts < 2 or (np.diff(self.cuts) <= 0).any():
            raise RecordError("cuts must hold at least two values in ascending order.")
        if (np.diff(self.anchors[:, 0], prepend=0) <= 0).any():
            raise RecordError("anchors must ascend from above zero in what the curves add up to.")

    @property
    def n_layers(self) -> int:
        """L, the number of layers."""
        return len(self.cost)

    def check_model(self, spec: MoESpec) -> None:
        """Raise RecordError unless it was measured on this model's weights."""
        spec.check_made_for(
            self.model_fingerprint,
            "The sensitivity was measured on a model",
            "Measure the sensitivity of it.",
        )

    def increase(self, cuts: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the predicted loss increase of each layer [L] at one cut per layer [L].

        In nats per token; the second value is its standard errors, NaN where not known.
        """
        mean, error, _ = self._completed(cuts)
        return mean, error

    def total_increase(self, cuts: ArrayLike) -> tuple[float, float | None]:
        """Return the predicted loss increase of all layers at one cut per layer [L].

        In nats per token, with its standard error; None if that is not known.
        """
        mean, error, joint_error = self._completed(cuts)
        independent = float(np.sqrt((error**2).sum()))
        total_error = joint_error * independent if independent != 0 else 0.0
        return float(mean.sum()), none_if_unknown(total_error)

    def first_order_increase(self, cuts: ArrayLike) -> NDArray[np.float64]:
        """Return the first-order part [L] of the increase that the curves leave out."""
        return self._at(np.asarray(cuts, dtype=np.float64), self.first_order)[0]

    def cuts_skipping(self, skipped: ArrayLike) -> NDArray[np.float64]:
        """Return the cut per layer [L] that skips these shares [L] of a layer's activations."""
        pairs = zip(np.asarray(skipped, dtype=np.float64), self.skipped[:, ::-1], strict=True)
        cuts = np.array([np.interp(share, row, self.cuts[::-1]) for share, row in pairs])
        return np.where(np.asarray(skipped) > 0, cuts, OFF)

    def uncorrected(self) -> SensitivityProfile:
        """Return the curves alone, as they were estimated, without what the anchors correct."""
        no_anchors, nothing = np.empty(0), np.zeros(self.first_order.shape)
        return replace(
            self,
            first_order=nothing,
            first_order_se=nothing,
            anchors=np.empty((0, 3)),
            factor=no_anchors,
            joint_error=no_anchors,
        )

    def _completed(self, cuts: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """Return the increase of each layer [L], its standard errors, and what relates them."""
        cuts = np.asarray(cuts, dtype=np.float64)
        curve, curve_se, first, first_se = self._at(
            cuts, self.increase_nats, self.increase_se, self.first_order, self.first_order_se
        )
        factor, joint_error = self.correction(float(curve.sum()))
        return first + factor * curve, np.hypot(first_se, factor * curve_se), joint_error

    def correction(self, total: float) -> tuple[float, float]:
        """Return `factor` and `joint_error` where the curves add up to `total`.

        Between anchors they change linearly with the logarithm of that; beyond them they stay.
        """
        if not len(self.anchors):
            return 1.0, 1.0
        sums = self.anchors[:, 0]
        place = np.log(max(total, sums[0]))
        factor, joint_error = (
            np.interp(place, np.log(sums), values) for values in (self.factor, self.joint_error)
        )
        return float(factor), float(joint_error)

    def _at(
        self, cuts: NDArray[np.float64], *curves: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], ...]:
        """Return the values [L] of curves [L, B] at each layer's cut; beyond the grid's end, 0."""
        grid = np.append(self.cuts, max(1.0, self.cuts[-1]) + 1e-9)
        place = np.clip(cuts, grid[0], grid[-1])
        right = np.maximum(1, np.searchsorted(grid, place))
        share = (place - grid[right - 1]) / (grid[right] - grid[right - 1])
        layers = np.arange(self.n_layers)
        ended = [np.pad(curve, ((0, 0), (0, 1))) for curve in curves]
        found = [
            (1 - share) * curve[layers, right - 1] + share * curve[layers, right] for curve in ended
        ]
        return tuple(np.where(cuts > 1, 0.0, values) for values in found)

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
        described = {name: header[name] for name in header if name not in IDENTIFYING}
        return cls(**fields_of(cls, {**described, **arrays}, str(path)))
