"""Standard errors as None, NaN and words where they are not known: one text alone has none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOT_KNOWN = "not known"


def none_if_unknown(error: float | None) -> float | None:
    """Return an error as records and JSON hold it: None for NaN, which is one not known."""
    return float(error) if error is not None and math.isfinite(error) else None


def nan_if_unknown(values: Any) -> NDArray[np.float64]:
    """Return errors, alone or in rows with their values, as an array: NaN where one is None."""
    return np.array(values, dtype=np.float64)


def error_text(error: float | None, form: str, scale: float = 1.0) -> str:
    """Return a standard error, scaled, as it is shown beside its value.

    None and NaN are not known.
    """
    error = none_if_unknown(error)
    if error is None:
        return f"± {NOT_KNOWN}"
    return f"± {scale * error:{form}}"
