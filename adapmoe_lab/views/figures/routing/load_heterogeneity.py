"""How much layers differ in the spread of their load and in how it repeats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.records import RoutingTrace
from adapmoe_lab.simulation.statistics.routing_patterns import (
    effective_experts,
    expert_use,
    locality,
    locality_by_chance,
)
from adapmoe_lab.views.figures import theme


@dataclass(frozen=True, eq=False)
class LoadHeterogeneityInfo:
    """Spread and repetition of each layer's load.

    Attributes:
        effective_experts: float64 [L], exp of the entropy of the load over experts: how many
            evenly used experts would spread it as widely; 1..E.
        n_experts: E.
        locality: float64 [L], fraction of a token's experts that the token before used too.
        locality_by_chance: float64 [L], the same for tokens that choose alike but independently.
        n_tokens: tokens counted.
    """

    effective_experts: NDArray[np.float64]
    n_experts: int
    locality: NDArray[np.float64]
    locality_by_chance: NDArray[np.float64]
    n_tokens: int


def load_heterogeneity_info(trace: RoutingTrace) -> LoadHeterogeneityInfo:
    """Compute the spread of each layer's load over experts, and how much of it repeats.

    Raises:
        ValueError: no sequence has two tokens, so nothing can repeat.
    """
    use = expert_use(trace.expert_indices, trace.spec.n_experts)
    return LoadHeterogeneityInfo(
        effective_experts=effective_experts(use),
        n_experts=trace.spec.n_experts,
        locality=locality(trace.expert_indices, trace.sequence_starts),
        locality_by_chance=locality_by_chance(use),
        n_tokens=trace.n_tokens,
    )


def plot_load_heterogeneity(info: LoadHeterogeneityInfo) -> go.Figure:
    """Draw the effective experts of each layer, and beside it locality against chance."""
    n_layers = len(info.locality)
    left, right = theme.side_by_side()
    all_alike = {"y0": info.n_experts, "y1": info.n_experts, "xref": "x domain", "x0": 0, "x1": 1}
    return theme.draw(
        [_spread(info), *_repetition(info)],
        title="Load by layer",
        subtitle=f"How many of {info.n_experts} experts a layer spreads its tokens over, "
        "and how many of a token's experts repeat",
        xaxis=theme.layer_axis(n_layers, domain=left),
        yaxis={"title": {"text": "effective experts"}, "range": [0, info.n_experts * 1.05]},
        xaxis2=theme.layer_axis(n_layers, domain=right, anchor="y2"),
        yaxis2={
            "title": {"text": "repeated experts"},
            "range": [0, 1.02],
            "tickformat": ".0%",
            "anchor": "x2",
        },
        shapes=[{"type": "line", **all_alike, "line": theme.DASHED}],
    )


def _spread(info: LoadHeterogeneityInfo) -> go.Bar:
    return go.Bar(
        x=np.arange(len(info.effective_experts)),
        y=info.effective_experts,
        marker={"color": theme.BLUE},
        showlegend=False,
        hovertemplate="layer %{x}<br><b>%{y:.1f}</b> effective experts"
        f" of {info.n_experts}<extra></extra>",
    )


def _repetition(info: LoadHeterogeneityInfo) -> tuple[go.Bar, go.Scatter]:
    layers = np.arange(len(info.locality))
    chance = go.Bar(
        x=layers,
        y=info.locality_by_chance,
        xaxis="x2",
        yaxis="y2",
        name="by chance",
        marker={"color": theme.FAINT},
        hovertemplate="layer %{x}<br>%{y:.0%} by chance<extra></extra>",
    )
    found = go.Scatter(
        x=layers,
        y=info.locality,
        xaxis="x2",
        yaxis="y2",
        name="used by the token before",
        mode="lines+markers",
        line={"color": theme.ORANGE, "width": 2},
        marker={"size": 7},
        hovertemplate="layer %{x}<br><b>%{y:.0%}</b> used by the token before<extra></extra>",
    )
    return chance, found
