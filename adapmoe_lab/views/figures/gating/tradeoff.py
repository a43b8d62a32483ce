"""Speed against loss: what each skipped fraction buys, the current choice, what was measured."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.records.standard_error import nan_if_unknown
from adapmoe_lab.simulation.simulate import Simulation
from adapmoe_lab.views.figures import theme


@dataclass(frozen=True)
class MeasuredPoint:
    """One config that was run.

    Attributes:
        ms_per_token: median milliseconds per output token.
        ms_spread: first and third quartile of it.
        loss_increase_nats: measured loss increase per token.
        loss_increase_se: its standard error; None if not known.
        label: what was run.
    """

    ms_per_token: float
    ms_spread: tuple[float, float]
    loss_increase_nats: float
    loss_increase_se: float | None
    label: str


@dataclass(frozen=True, eq=False)
class TradeoffInfo:
    """Predictions along one rule, and points beside it.

    Attributes:
        skipped_fraction: float64 [N], skipped expert activations over all the router chose.
        ms_per_token: float64 [N], predicted milliseconds per output token.
        loss_millinats: float64 [N], predicted loss increase per token.
        loss_se_millinats: float64 [N], its standard error; NaN if not known.
        current: predicted (skipped fraction, ms per token, millinats) of the current choice.
        measured: configs that were run.
        budget_millinats: loss increase that is still allowed.
    """

    skipped_fraction: NDArray[np.float64]
    ms_per_token: NDArray[np.float64]
    loss_millinats: NDArray[np.float64]
    loss_se_millinats: NDArray[np.float64]
    current: tuple[float, float, float] | None = None
    measured: tuple[MeasuredPoint, ...] = ()
    budget_millinats: float | None = None


def tradeoff_info(
    curve: Sequence[Simulation],
    current: Simulation | None = None,
    measured: Sequence[MeasuredPoint] = (),
    budget_nats: float | None = None,
) -> TradeoffInfo:
    """Collect predictions, all made with hardware and sensitivity, into one trade-off.

    Args:
        curve: predictions of one rule over skipped fractions.
        current: prediction of the current choice.
        measured: configs that were run.
        budget_nats: loss increase per token that is still allowed.

    Raises:
        ValueError: a prediction lacks its time or its loss.
    """
    points = nan_if_unknown([_point(s) for s in curve]).reshape(-1, 4)
    fractions, times, losses, errors = points.T
    here = None
    if current is not None:
        fraction, time, loss, _ = _point(current)
        here = (fraction, time, 1e3 * loss)
    return TradeoffInfo(
        skipped_fraction=fractions,
        ms_per_token=times,
        loss_millinats=1e3 * losses,
        loss_se_millinats=1e3 * errors,
        current=here,
        measured=tuple(measured),
        budget_millinats=None if budget_nats is None else 1e3 * budget_nats,
    )


def _point(simulation: Simulation) -> tuple[float, float, float, float | None]:
    time, loss = simulation.ms_per_token, simulation.loss_increase_nats
    if time is None or loss is None:
        raise ValueError(
            "A trade-off needs predicted time and loss; pass `hardware` and `sensitivity` to "
            "`simulate`."
        )
    return simulation.skipped_fraction, time, loss, simulation.loss_increase_se


def plot_tradeoff(info: TradeoffInfo) -> go.Figure:
    """Draw time per token against loss increase; down and left is better."""
    traces = [_band(info), _curve(info), _current(info), _measured(info)]
    return theme.draw(
        traces,
        title="Speed against loss",
        subtitle="Numbers on the curve: expert activations skipped; down and left is better",
        height=360,
        xaxis={"title": {"text": "time per output token (ms)"}, "showgrid": True},
        yaxis={
            "title": {"text": "loss increase (millinats per token)"},
            "zeroline": True,
            "zerolinecolor": theme.FAINT,
        },
        shapes=[] if info.budget_millinats is None else [_budget_line(info.budget_millinats)],
    )


def _budget_line(millinats: float) -> dict[str, object]:
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": millinats,
        "y1": millinats,
        "line": theme.DASHED,
        "label": {"text": "allowed", "textposition": "end", "yanchor": "bottom"},
    }


def _band(info: TradeoffInfo) -> go.Scatter:
    low = info.loss_millinats - info.loss_se_millinats
    high = info.loss_millinats + info.loss_se_millinats
    return theme.band(info.ms_per_token, low, high)


def _curve(info: TradeoffInfo) -> go.Scatter:
    return go.Scatter(
        x=info.ms_per_token,
        y=info.loss_millinats,
        customdata=info.skipped_fraction,
        text=[f"{fraction:.0%}" for fraction in info.skipped_fraction],
        textposition="top right",
        mode="lines+markers+text",
        name="predicted",
        line={"color": theme.BLUE, "width": 2},
        marker={"size": 6},
        hovertemplate="%{customdata:.1%} skipped<br><b>%{x:.2f} ms</b>, %{y:+.1f} millinats"
        "<extra>predicted</extra>",
    )


def _current(info: TradeoffInfo) -> go.Scatter:
    fraction, time, loss = info.current if info.current else (None, None, None)
    return go.Scatter(
        x=[time],
        y=[loss],
        customdata=[fraction],
        mode="markers",
        name="current choice",
        showlegend=info.current is not None,
        marker={"size": 14, "color": theme.ORANGE, "line": {"color": "#ffffff", "width": 2}},
        hovertemplate="%{customdata:.1%} skipped<br><b>%{x:.2f} ms</b>, %{y:+.1f} millinats"
        "<extra>current choice</extra>",
    )


def _measured(info: TradeoffInfo) -> go.Scatter:
    points = info.measured
    errors = nan_if_unknown([p.loss_increase_se for p in points])
    bars = {"color": theme.GREEN, "thickness": 1.5, "width": 4}
    return go.Scatter(
        x=[p.ms_per_token for p in points],
        y=[1e3 * p.loss_increase_nats for p in points],
        error_x={
            "array": [p.ms_spread[1] - p.ms_per_token for p in points],
            "arrayminus": [p.ms_per_token - p.ms_spread[0] for p in points],
            **bars,
        },
        error_y={"array": 1e3 * errors, **bars},
        customdata=theme.error_texts(1e3 * errors, ".1f"),
        text=[html.escape(p.label) for p in points],
        mode="markers",
        name="measured",
        showlegend=bool(points),
        marker={"size": 10, "symbol": "diamond", "color": theme.GREEN},
        hovertemplate="%{text}<br><b>%{x:.2f} ms</b>, %{y:+.1f} %{customdata} millinats"
        "<extra>measured</extra>",
    )
