"""Cells that say how many times more often something happens than expected."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.views.figures import theme

MOST = 4.0
"""Where colours end; what is further off is for hovering."""
TICKS = (
    (1 / 4, "≤ ×1/4"),
    (1 / 2, "×1/2"),
    (1 / 1.5, "×2/3"),
    (1.0, "×1"),
    (1.5, "×1.5"),
    (2.0, "×2"),
    (4.0, "≥ ×4"),
)
CROWDED = 40
"""Cells in a row from which on no gap is left between them."""


def bound_of(*lifts: NDArray[np.float64]) -> float:
    """Return the end of a colour scale that shows these lifts, a ratio in 2..`MOST`."""
    values = np.concatenate([lift[np.isfinite(lift)] for lift in lifts] + [np.ones(1)])
    reach = np.maximum(values, 1 / np.maximum(values, 1 / MOST)).max()
    return float(np.clip(reach, 2.0, MOST))


def lift_cells(
    lift: NDArray[np.float64], outside: NDArray[np.bool_], bound: float, **settings: Any
) -> go.Heatmap:
    """Return a map of ratios on a logarithmic scale; those that chance explains are neutral.

    Args:
        lift: float64 [rows, columns], observed over expected; NaN leaves a hole.
        outside: bool [rows, columns], what chance does not explain.
        bound: the ratio at which colours end, and its inverse.
        settings: further settings of the heatmap, hover texts among them.
    """
    shown = np.log2(np.clip(np.where(outside, lift, 1.0), 1 / bound, bound))
    end = float(np.log2(bound))
    ticks = [(np.log2(step), name) for step, name in TICKS if 1 / bound <= step <= bound]
    gap = 0 if max(lift.shape) > CROWDED else 1
    return go.Heatmap(
        z=np.where(np.isnan(lift), np.nan, shown),
        zmin=-end,
        zmax=end,
        xgap=gap,
        ygap=gap,
        colorscale=theme.diverging(0.5),
        colorbar=theme.colour_bar(
            "observed / expected",
            tickvals=[place for place, _ in ticks],
            ticktext=[name for _, name in ticks],
        ),
        hovertemplate="%{text}<extra></extra>",
        **settings,
    )
