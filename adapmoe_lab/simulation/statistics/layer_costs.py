"""What layers cost at an equal skip, so that estimators in different units can be compared."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records import SensitivityProfile

Floats = NDArray[np.float64]


def layer_costs(profile: SensitivityProfile, skipped_fraction: float) -> tuple[Floats, Floats]:
    """Return each layer's cost [L] when it alone skips this fraction, and its standard errors.

    In nats per token, by the profile's curves alone; the fraction is of the layer's own expert
    activations.

    Raises:
        ValueError: nothing is to be skipped, or more than can be with one expert kept.
    """
    most = round(float(profile.skipped.max(axis=1).min()), 6)
    if not 0 < skipped_fraction <= most:
        raise ValueError(
            f"skipped_fraction must be above 0 and at most {most:g}, what every layer of this "
            f"model can skip with one expert kept; got {skipped_fraction:g}."
        )
    cuts = profile.cuts_skipping(np.full(profile.n_layers, skipped_fraction))
    return profile.uncorrected().increase(cuts)


def shares_of_total(costs: Floats, errors: Floats) -> tuple[Floats, Floats]:
    """Return costs [L] as shares of their sum, and the standard errors of the shares.

    Errors of the costs are taken as independent and carried over to first order. Where the sum is
    not above zero there are no shares: all values are NaN.
    """
    total = float(costs.sum())
    if not total > 0:
        return np.full(costs.shape, np.nan), np.full(costs.shape, np.nan)
    shares = costs / total
    variance = (1 - 2 * shares) * errors**2 + shares**2 * (errors**2).sum()
    return shares, np.sqrt(variance) / total
