"""Marginal benefit of slots: loads against slots per layer, and what each further slot saves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.records import GatingTable, RoutingTrace
from adapmoe_lab.simulation.replay.miss_curves import miss_curves
from adapmoe_lab.views.figures import theme


@dataclass(frozen=True, eq=False)
class MarginalBenefitInfo:
    """Loads per token of each layer under LRU with slots of its own.

    Attributes:
        loads: float64 [L, E+1], with 0..E slots, exact.
        by_chance: float64 [E+1], mean of the layers if routers chose as many experts at random.
        n_tokens: tokens replayed.
    """

    loads: NDArray[np.float64]
    by_chance: NDArray[np.float64]
    n_tokens: int

    @property
    def saved(self) -> NDArray[np.float64]:
        """Loads per token that the 1st to E-th slot saves, float64 [L, E]."""
        return -np.diff(self.loads, axis=1)


def marginal_benefit_info(
    trace: RoutingTrace, gating: GatingTable | None = None
) -> MarginalBenefitInfo:
    """Measure the miss curve of each layer.

    A uniform router finds slots/E of what it needs, whatever was evicted.
    """
    loads, n_experts = miss_curves(trace, gating), trace.spec.n_experts
    missing = 1 - np.arange(n_experts + 1) / n_experts
    return MarginalBenefitInfo(loads, loads[:, 0].mean() * missing, trace.n_tokens)


def plot_marginal_benefit(info: MarginalBenefitInfo) -> go.Figure:
    """Draw loads against slots, a line per layer, and beside it what each slot saves."""
    n_layers, n_slots = info.saved.shape
    left, right = [0.0, 0.44], [0.56, 1.0]
    return theme.draw(
        [*_lines(info), _heatmap(info)],
        title="Marginal benefit of a slot",
        subtitle=f"Loads per token of each layer under LRU, by its slots; {info.n_tokens:,} tokens",
        height=max(380, theme.heatmap_height(n_layers)),
        margin={"t": 106},
        legend=theme.KEY_ROW,
        annotations=[
            theme.panel_title(left, "loads left"),
            theme.panel_title(right, "loads that one more slot saves"),
        ],
        xaxis={
            **theme.numbered_axis("slots of the layer", n_slots + 1, domain=left),
            "range": [0, n_slots],
        },
        yaxis={"title": {"text": "loads per token"}, "rangemode": "tozero"},
        xaxis2=theme.numbered_axis(
            "slot", n_slots + 1, domain=right, anchor="y2", range=[0.5, n_slots + 0.5]
        ),
        yaxis2={
            **theme.layer_axis(n_layers),
            "range": [n_layers - 0.5, -0.5],
            "anchor": "x2",
            "showgrid": False,
        },
    )


def _lines(info: MarginalBenefitInfo) -> list[go.Scatter]:
    n_layers, n_slots = info.saved.shape
    slots = np.arange(n_slots + 1)
    chance = go.Scatter(
        x=slots,
        y=info.by_chance,
        mode="lines",
        name="uniform router",
        line=theme.DASHED,
        hovertemplate="%{x} slots<br>%{y:.2f} loads per token by chance<extra></extra>",
    )
    layers = [
        go.Scatter(
            x=slots,
            y=info.loads[layer],
            mode="lines",
            name="each layer, first light, last dark",
            showlegend=layer == n_layers - 1,
            line={"color": colour, "width": 1.2},
            hovertemplate=f"layer {layer}, %{{x}} slots<br><b>%{{y:.2f}}</b> loads per token"
            "<extra></extra>",
        )
        for layer, colour in enumerate(theme.ordered(n_layers))
    ]
    mean = go.Scatter(
        x=slots,
        y=info.loads.mean(axis=0),
        mode="lines+markers",
        name="mean",
        line={"color": theme.ORANGE, "width": 2.5},
        marker={"size": 6 if n_slots <= 32 else 1},
        hovertemplate="%{x} slots<br><b>%{y:.2f}</b> loads per token, mean<extra></extra>",
    )
    return [chance, *layers, mean]


def _heatmap(info: MarginalBenefitInfo) -> go.Heatmap:
    n_layers, n_slots = info.saved.shape
    return go.Heatmap(
        x=np.arange(1, n_slots + 1),
        y=np.arange(n_layers),
        z=info.saved,
        xaxis="x2",
        yaxis="y2",
        zmin=0,
        colorscale=theme.SEQUENTIAL,
        colorbar=theme.colour_bar("loads saved per token"),
        hovertemplate="layer %{y}, slot %{x}<br>saves <b>%{z:.3f}</b> loads per token"
        "<extra></extra>",
    )
