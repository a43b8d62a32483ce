"""The look all figures share, readable on light and dark pages alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray
from plotly.colors import sample_colorscale

from adapmoe_lab.records.standard_error import error_text

FONT_FAMILY = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', Arial, sans-serif"
)
INK = "#6e7781"
"""Text: at least 4:1 against white and against JupyterLab's dark page."""
FAINT = "rgba(128, 138, 150, 0.55)"
"""What is there to compare with: baselines, chance."""
GRID = "rgba(128, 138, 150, 0.22)"
BLUE, ORANGE, GREEN = "#2a7fba", "#d9662b", "#1b9e77"
"""Told apart under every common colour blindness: the prediction, the choice, the measurement."""
BAND = "rgba(42, 127, 186, 0.14)"
"""A standard error around a blue line."""
LINES_AND_BANDS = (
    (BLUE, BAND),
    (ORANGE, "rgba(217, 102, 43, 0.14)"),
    (GREEN, "rgba(27, 158, 119, 0.14)"),
)
"""Colours of lines with a standard error, each with its band's."""
PAIRED = (ORANGE, "#e5ab3c", BLUE, "#8cbbe0", "#84cbb0", GREEN)
"""Three pairs of related colours, for lines of three kinds."""
CHANCE_BAND = "rgba(128, 138, 150, 0.28)"
"""Where values lie that chance alone explains."""
DASHED = {"color": INK, "width": 1, "dash": "dash"}
"""A line that marks a limit."""

KEY_ROW = {"x": 0, "xanchor": "left", "y": 0.86, "traceorder": "normal"}
"""A legend in a row of its own below the subtitle, for figures of 360 pixels and more."""

SEQUENTIAL = ((0.0, "#e3edf5"), (0.5, "#6fa8d3"), (1.0, "#0f4c81"))
BELOW, MIDDLE, ABOVE = ("#1f5f99", "#8fbbdc"), "#eceff1", ("#f0b48a", "#c4501b")

_HOVER = {"bgcolor": "#1f2933", "bordercolor": "#1f2933", "font": {"color": "#ffffff"}}
_AXIS = {
    "automargin": True,
    "fixedrange": True,
    "gridcolor": GRID,
    "linecolor": FAINT,
    "showline": False,
    "ticks": "",
    "title": {"standoff": 8, "font": {"size": 12}},
    "zeroline": False,
}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT_FAMILY, "size": 12, "color": INK},
        "title": {
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 26},
            "font": {"size": 15, "weight": 600},
        },
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "margin": {"l": 8, "r": 12, "t": 64, "b": 8},
        "colorway": [BLUE, ORANGE, GREEN],
        "dragmode": False,
        "hoverlabel": {**_HOVER, "align": "left"},
        "legend": {
            "orientation": "h",
            "x": 0.95,
            "xanchor": "right",
            "y": 0.97,
            "yref": "container",
            "yanchor": "top",
        },
        "modebar": {
            "bgcolor": "rgba(0, 0, 0, 0)",
            "color": FAINT,
            "activecolor": BLUE,
            "remove": ["sendChartToCloud", "select2d", "lasso2d"],
        },
        "xaxis": {**_AXIS, "showgrid": False},
        "yaxis": _AXIS,
        "bargap": 0.35,
    },
    data={"heatmap": [{"xgap": 1, "ygap": 1}]},
)


def draw(
    traces: Sequence[Any], *, title: str, subtitle: str, height: int = 320, **layout: Any
) -> go.Figure:
    """Return a figure of the traces in the shared look; `height` in pixels."""
    small = f'<span style="font-size: 12px; font-weight: 400">{subtitle}</span>'
    heading = {"text": f"{title}<br>{small}"}
    return go.Figure(
        data=list(traces),
        layout={"template": TEMPLATE, "title": heading, "height": height, **layout},
    )


def layer_axis(n_layers: int, **settings: Any) -> dict[str, Any]:
    """Return an axis with one place per layer, labelled often enough and no more."""
    return numbered_axis("layer", n_layers, **settings)


def numbered_axis(noun: str, n: int, n_labels: int = 16, **settings: Any) -> dict[str, Any]:
    """Return an axis with places 0..n-1 of what the noun names, `n_labels` of them labelled."""
    every = next(step for step in (1, 2, 4, 8, 16, 32) if n <= n_labels * step or step == 32)
    return {
        "title": {"text": noun},
        "range": [-0.5, n - 0.5],
        "tick0": 0,
        "dtick": every,
        **settings,
    }


def log_axis(values: NDArray[np.float64]) -> dict[str, Any]:
    """Return a logarithmic axis with plain numbers, fewer of them the more decades it spans."""
    first, last = np.floor(np.log10(values.min())), np.ceil(np.log10(values.max()))
    within = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [m * 10.0**decade for decade in np.arange(first, last + 1) for m in within]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def band(x: ArrayLike, low: ArrayLike, high: ArrayLike, **settings: Any) -> go.Scatter:
    """Return the filled region between two lines over the same places; NaN leaves gaps."""
    x, low, high = np.asarray(x), np.asarray(low), np.asarray(high)
    looks = {
        "fillcolor": BAND,
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        "showlegend": False,
    }
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([high, low[::-1]]),
        fill="toself",
        **{**looks, **settings},
    )


def error_bars(errors: NDArray[np.float64], colour: str = INK) -> dict[str, Any]:
    """Return thin bars of standard errors around bars or markers."""
    return {"array": errors, "color": colour, "thickness": 1, "width": 3}


def error_texts(errors: ArrayLike, form: str) -> NDArray[np.object_]:
    """Return standard errors in words, of the same shape, for the text that follows a pointer."""
    values = np.asarray(errors, dtype=np.float64)
    texts = [error_text(error, form) for error in values.ravel().tolist()]
    return np.array(texts, dtype=object).reshape(values.shape)


def ordered(n: int) -> list[str]:
    """Return n colours for lines in an order, light to dark."""
    return sample_colorscale([[0.0, "#7db3dc"], [1.0, "#1c5f96"]], np.linspace(0, 1, n).tolist())


def heatmap_height(n_rows: int) -> int:
    """Return the height in pixels that gives every row a readable place."""
    return 130 + int(min(620, max(160, n_rows * 22)))


def colour_bar(title: str, **settings: Any) -> dict[str, Any]:
    """Return the key of a heatmap, titled along its side like an axis."""
    return {
        "title": {"text": title, "side": "right", "font": {"size": 12}},
        "outlinewidth": 0,
        "thickness": 10,
        "len": 1.0,
        "ticks": "",
        **settings,
    }


def diverging(middle: float) -> list[tuple[float, str]]:
    """Return a colour scale over 0..1 whose neutral colour lies at `middle`."""
    return [
        (0.0, BELOW[0]),
        (middle / 2, BELOW[1]),
        (middle, MIDDLE),
        ((1 + middle) / 2, ABOVE[0]),
        (1.0, ABOVE[1]),
    ]


def side_by_side(gap: float = 0.16) -> tuple[list[float], list[float]]:
    """Return the horizontal domains of two equal panels."""
    return [0.0, (1 - gap) / 2], [(1 + gap) / 2, 1.0]


def panel_grid(
    n_panels: int, n_columns: int, gaps: tuple[float, float] = (0.06, 0.24)
) -> list[tuple[list[float], list[float]]]:
    """Return the horizontal and vertical domains of equal panels, row by row from the top."""
    n_rows = -(-n_panels // n_columns)
    width = (1 - gaps[0] * (n_columns - 1)) / n_columns
    height = (1 - gaps[1] * (n_rows - 1)) / n_rows
    grid = []
    for panel in range(n_panels):
        row, column = divmod(panel, n_columns)
        left, top = column * (width + gaps[0]), 1 - row * (height + gaps[1])
        grid.append(([left, left + width], [max(0.0, top - height), top]))
    return grid


def panel_title(domain: Sequence[float], text: str, top: float = 1.0) -> dict[str, Any]:
    """Return the heading of one of several panels, an annotation above its upper left corner."""
    return {
        "text": text,
        "x": domain[0],
        "xref": "paper",
        "xanchor": "left",
        "y": top,
        "yref": "paper",
        "yanchor": "bottom",
        "yshift": 4,
        "showarrow": False,
    }
