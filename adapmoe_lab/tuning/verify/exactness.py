"""Whether a model's logits and tokens are those of the plain transformers model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.evaluation.exactness import Exactness
from adapmoe_lab.records.verify_report import Check

EXACTNESS = "exactness"


def check_exactness(found: Exactness) -> Check:
    """Judge a comparison with the plain model, made with nothing skipped."""
    errors, gaps = found.errors, found.gaps
    n_alike, n_ties = (int((values <= found.bound).sum()) for values in (errors, gaps))
    n_same = int((gaps == 0).sum())
    largest = f"{errors.max():.1e}" if np.isfinite(errors).all() else "not finite"
    tokens = f"{n_same} of {len(gaps)} decoded tokens the same"
    if n_ties > n_same:
        tokens += f", {n_ties - n_same} tied"
    return Check(
        EXACTNESS,
        "passed" if found.is_exact else "failed",
        f"logits: largest error {largest}, {n_alike:,} of {len(errors):,} positions within the "
        f"bound; {tokens}; against {found.reference}",
        f"{found.bound:.1e} at {found.alike_share:.0%} of positions",
        {
            "bound": found.bound,
            "alike_share": found.alike_share,
            "reference": found.reference,
            "errors": _finite(errors),
            "gaps": _finite(gaps),
        },
    )


def _finite(values: NDArray[np.float64]) -> list[float | None]:
    """Return numbers as JSON holds them, None for those that are not finite."""
    return [float(value) if np.isfinite(value) else None for value in values]
