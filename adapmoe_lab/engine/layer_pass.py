"""What one layer's experts did in one pass, forward or backward, as callbacks are given it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class LayerPass:
    """What one layer did in one forward pass; given to callbacks at EXPERTS_OUTPUT.

    Attributes:
        layer: number of the MoE layer.
        hidden: the experts' input [T, D].
        indices: the router's choice, int64 [T, K]; E means no expert.
        weights: the router's own weights, float32 [T, K], before gating.
        keep: bool [T, K], which of them were run.
        contributions: weighted expert outputs [T, K, D], zero where nothing was run.
        output: their sum [T, D], compensated for what was not run, as the model goes on with it.
    """

    layer: int
    hidden: torch.Tensor
    indices: NDArray[np.int64]
    weights: NDArray[np.float32]
    keep: NDArray[np.bool_]
    contributions: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True, eq=False)
class LayerGradient:
    """What the backward pass found in one layer; given to callbacks at EXPERTS_GRADIENT.

    Attributes:
        layer: number of the MoE layer.
        hidden: the experts' input [T, D].
        indices: the router's choice, int64 [T, K]; E means no expert.
        weights: the router's weights [T, K] that the experts were summed with.
        keep: bool [T, K], which of them were run.
        contributions: weighted expert outputs [T, K, D], zero where nothing was run.
        gradient: of what was differentiated, with respect to their sum [T, D].
        surrogate_contributions: what surrogates would give in each choice's place, weighted,
            float32 [T, K, D]; None where there are none.
    """

    layer: int
    hidden: torch.Tensor
    indices: NDArray[np.int64]
    weights: torch.Tensor
    keep: NDArray[np.bool_]
    contributions: torch.Tensor
    gradient: torch.Tensor
    surrogate_contributions: torch.Tensor | None = None
