"""Reduced-rank ridge regression: the best affine map of a given rank from inputs to outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

RIDGES = torch.logspace(-8, 4, 49, dtype=torch.float64)
"""Ridges that are tried, in units of the largest squared singular value of the inputs."""

FEWEST_TOKENS = 4
"""With fewer, nothing is concluded but a mean."""

METRIC_FLOOR = 1e-2
"""Share of an output metric's mean eigenvalue that every direction gets in addition."""


@dataclass(frozen=True, eq=False)
class OutputMetric:
    """How much errors in every direction of the output count: e @ M @ e.

    Attributes:
        root: the symmetric square root of M, [D, D].
        inverse_root: its inverse.
    """

    root: torch.Tensor
    inverse_root: torch.Tensor

    @classmethod
    def of_gradients(cls, gradients: torch.Tensor) -> OutputMetric:
        """Return the mean squared effect of an error on a loss with gradients [T, D].

        Slightly evened out, so that no direction is free.
        """
        moment = gradients.T @ gradients / len(gradients)
        values, vectors = torch.linalg.eigh(moment)
        roots = (values.clamp(min=0) + METRIC_FLOOR * values.mean()).sqrt()
        return cls((vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T)

    def applied(self, errors: torch.Tensor) -> torch.Tensor:
        """Return M times errors [n, D]."""
        return errors @ self.root @ self.root


@dataclass(frozen=True, eq=False)
class LowRankMap:
    """The map mean + up @ (down @ (x - centre)); its first r terms are the best of rank r.

    Attributes:
        mean: [D], weighted mean output.
        centre: [D], weighted mean input.
        down: [R, D].
        up: [D, R].
        gains: float64 [R], what every further term takes off the summed weighted squared error.
    """

    mean: torch.Tensor
    centre: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    gains: torch.Tensor


def fit_low_rank(
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    weights: torch.Tensor,
    max_rank: int,
    metric: OutputMetric | None = None,
) -> LowRankMap:
    """Fit outputs [n, D] by inputs [n, D], errors counting by weights [n] and in a metric.

    Minimises sum_i weights_i |y_i - s(x_i)|^2 + ridge |B|^2 over the linear parts B of every rank
    up to `max_rank` (Mukherjee and Zhu, Reduced rank ridge regression, 2011). The ridge is the
    one of least generalised cross-validation error among those that leave half of the degrees of
    freedom. With few tokens the mean shrinks towards zero (James and Stein), and with none the map
    is zero. Everything is float64.
    """
    width = inputs.shape[1]
    if not weights.any():
        zero = inputs.new_zeros(width)
        none = inputs.new_zeros(max_rank, width)
        return LowRankMap(zero, zero, none, none.T, inputs.new_zeros(max_rank))
    shares = weights / weights.sum()
    n_effective = float(1 / (shares**2).sum())
    centre, mean = shares @ inputs, shares @ outputs
    x = (inputs - centre) * shares.sqrt()[:, None]
    y = (outputs - mean) * shares.sqrt()[:, None]
    if metric is not None:
        y = y @ metric.root
    squares, right = _principal(x)
    projected = right.T @ (x.T @ y) / squares.sqrt()[:, None]  # left vectors times y, [r, D]
    ridge, variance = _cross_validated_ridge(squares, projected, y, n_effective)
    shrunk = projected * (squares / (squares + ridge)).sqrt()[:, None]
    gains, turns = _principal(shrunk)
    gains, turns = _exactly(max_rank, gains, turns)
    coefficients = projected * (squares.sqrt() / (squares + ridge))[:, None]  # [r, D]
    down = (right @ (coefficients @ turns)).T
    up = turns if metric is None else metric.inverse_root @ turns
    return LowRankMap(
        mean=_shrinkage(mean if metric is None else mean @ metric.root, variance) * mean,
        centre=centre,
        down=down,
        up=up,
        gains=gains * float(weights.sum()),
    )


def _principal(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return squared singular values [r], largest first, and right vectors [D, r] of [n, D].

    By the smaller of the two Gram matrices; what is zero to its precision is left out.
    """
    n_rows, n_columns = matrix.shape
    is_wide = n_rows < n_columns
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)
    squares, vectors = squares.flip(0), vectors.flip(1)
    floor = squares[:1] * torch.finfo(matrix.dtype).eps * len(squares)
    squares, vectors = squares[squares > floor], vectors[:, squares > floor]
    return squares, matrix.T @ vectors / squares.sqrt() if is_wide else vectors


def _exactly(
    rank: int, gains: torch.Tensor, turns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut gains [r] and directions [D, r] to a rank, or fill them up with zeros."""
    missing = max(0, rank - len(gains))
    return pad(gains[:rank], (0, missing)), pad(turns[:, :rank], (0, missing))


def _cross_validated_ridge(
    squares: torch.Tensor, projected: torch.Tensor, y: torch.Tensor, n_effective: float
) -> tuple[float, float]:
    """Return the ridge of least generalised cross-validation error (Golub, Heath, Wahba 1979).

    Args:
        squares: squared singular values of the inputs [r], largest first.
        projected: left singular vectors times the outputs [r, D].
        y: the outputs [n, D].
        n_effective: tokens, as many as count.

    Returns:
        The ridge, and the variance of the mean output that it leaves.
    """
    ridges = RIDGES.to(y) * (squares[0] if len(squares) else 1.0)
    energy = (projected**2).sum(dim=1)
    kept = squares / (squares + ridges[:, None])  # [ridges, r]
    residual = ((y**2).sum() - energy.sum() + (1 - kept) ** 2 @ energy).clamp(min=0)
    left = n_effective - 1 - kept.sum(dim=1)  # degrees of freedom
    error = (residual / left**2).where(left >= n_effective / 2, torch.inf)
    best = int(error.argmin())
    if n_effective < FEWEST_TOKENS:
        best = len(ridges) - 1
    variance = float(residual[best] / left[best]) if left[best] > 0 else float("inf")
    return float(ridges[best]), variance


def _shrinkage(mean: torch.Tensor, variance: float) -> float:
    """Return the positive-part James-Stein factor of a mean [D] of a known variance."""
    square = float((mean**2).sum())
    return max(0.0, 1 - variance / square) if square > 0 else 0.0
