"""What a config does in each layer: experts run per token, and hits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.simulation.simulate import Simulation
from adapmoe_lab.views.figures import theme


@dataclass(frozen=True, eq=False)
class LayerBarsInfo:
    """Experts per token and hit rate of a config, and of the one it is compared with.

    Attributes:
        experts_per_token: float64 [L], experts run per token.
        hit_rate: float64 [L], share of needed experts that are resident.
        mean_experts_per_token: over layers.
        mean_hit_rate: over layers, weighted by how many experts each needs.
        baseline_experts_per_token: float64 [L], or None without a baseline.
        baseline_hit_rate: float64 [L], or None without a baseline.
        baseline_name: what the baseline is called.
    """

    experts_per_token: NDArray[np.float64]
    hit_rate: NDArray[np.float64]
    mean_experts_per_token: float
    mean_hit_rate: float
    baseline_experts_per_token: NDArray[np.float64] | None = None
    baseline_hit_rate: NDArray[np.float64] | None = None
    baseline_name: str = ""


def layer_bars_info(
    simulation: Simulation,
    baseline: Simulation | None = None,
    baseline_name: str = "nothing skipped",
) -> LayerBarsInfo:
    """Collect what a simulation says of each layer, beside a baseline if there is one."""
    return LayerBarsInfo(
        experts_per_token=simulation.experts_per_token,
        hit_rate=simulation.hit_rate,
        mean_experts_per_token=simulation.mean_experts_per_token,
        mean_hit_rate=simulation.mean_hit_rate,
        baseline_experts_per_token=baseline.experts_per_token if baseline else None,
        baseline_hit_rate=baseline.hit_rate if baseline else None,
        baseline_name=baseline_name if baseline else "",
    )


def plot_layer_bars(info: LayerBarsInfo) -> go.Figure:
    """Draw both as bars per layer, the baseline as an outline behind them."""
    n_layers = len(info.hit_rate)
    left, right = theme.side_by_side()
    traces = [
        _bars(info.experts_per_token, theme.BLUE, "", "%{y:.2f} experts per token"),
        _bars(info.hit_rate, theme.GREEN, "2", "%{y:.0%} hits"),
    ]
    if info.baseline_experts_per_token is not None and info.baseline_hit_rate is not None:
        name = info.baseline_name
        traces += [
            _outline(info.baseline_experts_per_token, "", name, "%{y:.2f} experts per token"),
            _outline(info.baseline_hit_rate, "2", name, "%{y:.0%} hits"),
        ]
    return theme.draw(
        traces,
        title="By layer",
        subtitle=f"{info.mean_experts_per_token:.2f} experts per token, "
        f"{info.mean_hit_rate:.0%} hits"
        + (f"; outlined: {info.baseline_name}" if info.baseline_name else ""),
        height=280,
        showlegend=False,
        barmode="overlay",
        xaxis=theme.layer_axis(n_layers, domain=left),
        yaxis={"title": {"text": "experts per token"}, "rangemode": "tozero"},
        xaxis2=theme.layer_axis(n_layers, domain=right, anchor="y2"),
        yaxis2={
            "title": {"text": "hit rate"},
            "range": [0, 1.02],
            "tickformat": ".0%",
            "anchor": "x2",
        },
    )


def _bars(values: NDArray[np.float64], colour: str, panel: str, hover: str) -> go.Bar:
    return go.Bar(
        x=np.arange(len(values)),
        y=values,
        xaxis=f"x{panel}",
        yaxis=f"y{panel}",
        marker={"color": colour},
        hovertemplate=f"layer %{{x}}<br><b>{hover}</b><extra></extra>",
    )


def _outline(values: NDArray[np.float64], panel: str, name: str, hover: str) -> go.Bar:
    return go.Bar(
        x=np.arange(len(values)),
        y=values,
        xaxis=f"x{panel}",
        yaxis=f"y{panel}",
        marker={"color": "rgba(0, 0, 0, 0)", "line": {"color": theme.FAINT, "width": 1.5}},
        hovertemplate=f"layer %{{x}}, {name}<br>{hover}<extra></extra>",
    )
