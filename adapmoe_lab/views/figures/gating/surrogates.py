"""What skipping costs with different things in place of the skipped experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.records import LossReport
from adapmoe_lab.records.standard_error import nan_if_unknown
from adapmoe_lab.views.figures import theme

HEIGHT_PER_SURROGATE = 40


@dataclass(frozen=True, eq=False)
class SurrogatesInfo:
    """Measured loss increases of N surrogates, in millinats per token.

    Attributes:
        names: of the surrogates; the first is what the others are compared with.
        increase: float64 [N], over nothing skipped.
        increase_se: float64 [N], its standard error, paired by text; NaN, here and below, if not
            known.
        difference: float64 [N], over the first surrogate.
        difference_se: float64 [N], its standard error, paired by text.
        skipped_fraction: skipped expert activations over all the router chose, the mean of all.
        n_tokens: tokens measured.
    """

    names: tuple[str, ...]
    increase: NDArray[np.float64]
    increase_se: NDArray[np.float64]
    difference: NDArray[np.float64]
    difference_se: NDArray[np.float64]
    skipped_fraction: float
    n_tokens: int


def surrogates_info(reports: Mapping[str, LossReport], baseline: LossReport) -> SurrogatesInfo:
    """Compare losses under one gating, by what takes the place of a skipped expert.

    Args:
        reports: by name; the first is what the others are compared with.
        baseline: the loss of the same texts with nothing skipped.

    Raises:
        ValueError: there is no report.
    """
    if not reports:
        raise ValueError("There is no loss to compare; measure at least one surrogate.")
    first = next(iter(reports.values()))
    increase, increase_se = _increases(reports, baseline)
    difference, difference_se = _increases(reports, first)
    return SurrogatesInfo(
        names=tuple(reports),
        increase=1e3 * increase,
        increase_se=1e3 * increase_se,
        difference=1e3 * difference,
        difference_se=1e3 * difference_se,
        skipped_fraction=float(np.mean([r.skipped_fraction for r in reports.values()])),
        n_tokens=int(baseline.n_predicted.sum()),
    )


def _increases(reports: Mapping[str, LossReport], baseline: LossReport) -> NDArray[np.float64]:
    """Return increases [N] and their standard errors [N], NaN if not known, as [2, N]."""
    found = [report.increase_over(baseline) for report in reports.values()]
    return nan_if_unknown(found).T


def plot_surrogates(info: SurrogatesInfo) -> go.Figure:
    """Draw what each costs, and beside it how far it is from the first, which is known better."""
    left, right = theme.side_by_side(0.06)
    rows = {"range": [len(info.names) - 0.5, -0.5], "showgrid": False}
    axis = {"showgrid": True, "zeroline": True, "zerolinecolor": theme.FAINT}
    return theme.draw(
        [_increase(info), _difference(info)],
        title="What takes the place of a skipped expert",
        subtitle=f"{info.skipped_fraction:.1%} of the expert activations skipped by the same cuts, "
        f"{info.n_tokens:,} tokens; lines: standard error",
        height=140 + HEIGHT_PER_SURROGATE * len(info.names),
        margin={"t": 88},
        showlegend=False,
        annotations=[
            theme.panel_title(left, "over the model with nothing skipped"),
            theme.panel_title(right, f"over “{info.names[0]}”, which is surer"),
        ],
        xaxis={
            **axis,
            "title": {"text": "loss increase (millinats per token)"},
            "rangemode": "tozero",
            "domain": left,
        },
        yaxis=rows,
        xaxis2={
            **axis,
            "title": {"text": "difference (millinats per token)"},
            "domain": right,
            "anchor": "y2",
        },
        yaxis2={**rows, "anchor": "x2", "matches": "y", "showticklabels": False},
    )


def _increase(info: SurrogatesInfo) -> go.Bar:
    return go.Bar(
        x=info.increase,
        y=info.names,
        orientation="h",
        customdata=theme.error_texts(info.increase_se, ".1f"),
        error_x=theme.error_bars(info.increase_se),
        marker={"color": theme.GREEN},
        hovertemplate="%{y}<br><b>%{x:+.1f}</b> %{customdata} millinats<extra></extra>",
    )


def _difference(info: SurrogatesInfo) -> go.Scatter:
    return go.Scatter(
        x=info.difference,
        y=info.names,
        xaxis="x2",
        yaxis="y2",
        customdata=theme.error_texts(info.difference_se, ".1f"),
        error_x={**theme.error_bars(info.difference_se, theme.GREEN), "thickness": 1.5},
        mode="markers",
        marker={"color": theme.GREEN, "size": 10, "symbol": "diamond"},
        hovertemplate="%{y}<br><b>%{x:+.1f}</b> %{customdata} millinats<extra></extra>",
    )
