"""How far apart two computations of the same logits may be by rounding alone."""

from __future__ import annotations

import torch

N_ROUNDINGS = 8
"""Largest relative error, in what a precision rounds off of one: as the families' tests take."""


def rounding_bound(dtype: torch.dtype) -> float:
    """Return the largest relative error of logits in a precision that is no more than rounding."""
    return N_ROUNDINGS * torch.finfo(dtype).eps / 2
