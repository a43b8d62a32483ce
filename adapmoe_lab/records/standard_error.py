"""Standard errors in words: one text alone has none."""

from __future__ import annotations

import math

NOT_KNOWN = "not known"


def error_text(error: float | None, form: str, scale: float = 1.0) -> str:
    """Return a standard error, scaled, as it is shown beside its value.

    None and NaN are not known.
    """
    if error is None or not math.isfinite(error):
        return f"± {NOT_KNOWN}"
    return f"± {scale * error:{form}}"
