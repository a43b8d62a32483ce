"""Whether a token uses the experts that tokens before it used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.records import RoutingTrace
from adapmoe_lab.simulation.statistics.chance import Band, locality_band
from adapmoe_lab.simulation.statistics.routing_patterns import (
    expert_use,
    locality,
    locality_by_chance,
    tokens_after,
)
from adapmoe_lab.views.figures import theme

DISTANCES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, eq=False)
class LocalityInfo:
    """Share of a token's experts that a token before it used, at N distances.

    Attributes:
        distances: int64 [N], in tokens; the first is 1, the token before.
        locality: float64 [N, L].
        same_use: float64 [L], what tokens of the same use in any order would give.
        uniform: what a uniform router would give, by distance [N].
        n_pairs: int64 [N], pairs of tokens compared.
    """

    distances: NDArray[np.int64]
    locality: NDArray[np.float64]
    same_use: NDArray[np.float64]
    uniform: Band
    n_pairs: NDArray[np.int64]


def locality_info(trace: RoutingTrace) -> LocalityInfo:
    """Compute how much of each layer's choice repeats, over growing distances.

    Raises:
        ValueError: no sequence has two tokens, so nothing can repeat.
    """
    starts, n_tokens = trace.sequence_starts, trace.n_tokens
    longest = int(np.diff(np.append(starts, n_tokens)).max())
    distances = [d for d in DISTANCES if d == 1 or d < longest]
    n_pairs = np.array([len(tokens_after(n_tokens, starts, d)) for d in distances])
    spec = trace.spec
    return LocalityInfo(
        distances=np.array(distances),
        locality=np.stack([locality(trace.expert_indices, starts, d) for d in distances]),
        same_use=locality_by_chance(expert_use(trace.expert_indices, spec.n_experts)),
        uniform=locality_band(n_pairs, spec.n_experts, spec.top_k),
        n_pairs=n_pairs,
    )


def plot_locality(info: LocalityInfo) -> go.Figure:
    """Draw what the token before shares, by layer, and beside it how that fades with distance."""
    n_layers = info.locality.shape[1]
    left, right = theme.side_by_side()
    top = 1.08 * max(float(info.locality.max()), float(info.uniform.high.max()))
    y = {"title": {"text": "repeated experts"}, "range": [0, top], "tickformat": ".0%"}
    return theme.draw(
        [*_by_layer(info), *_by_distance(info)],
        title="Experts used again",
        subtitle=f"Of a token's experts, {info.locality[0].mean():.0%} were used by the token "
        f"before; a uniform router repeats {info.uniform.mean[0]:.0%}",
        height=360,
        margin={"t": 106},
        legend=theme.KEY_ROW,
        annotations=[
            theme.panel_title(left, "the token before"),
            theme.panel_title(right, "further back: mean and range of the layers"),
        ],
        xaxis=theme.layer_axis(n_layers, domain=left),
        yaxis=y,
        xaxis2={
            "title": {"text": "distance in tokens"},
            "type": "log",
            "tickvals": info.distances,
            "ticktext": [str(d) for d in info.distances],
            "range": np.log10(np.array([0.85, 1.18 * info.distances[-1]])).tolist(),
            "domain": right,
            "anchor": "y2",
        },
        yaxis2={**y, "anchor": "x2"},
    )


def _by_layer(info: LocalityInfo) -> list[go.Scatter | go.Bar]:
    n_layers = info.locality.shape[1]
    layers = np.arange(n_layers)
    low, high = info.uniform.low[0], info.uniform.high[0]
    uniform = theme.band(
        [-0.5, n_layers - 0.5],
        [low, low],
        [high, high],
        fillcolor=theme.CHANCE_BAND,
        line={"width": 1, "color": theme.INK},
        name="uniform router, 95%",
        showlegend=True,
    )
    same_use = go.Bar(
        x=layers,
        y=info.same_use,
        name="same use, any order",
        marker={"color": theme.CHANCE_BAND},
        hovertemplate="layer %{x}<br>%{y:.1%} in any order<extra></extra>",
    )
    found = go.Scatter(
        x=layers,
        y=info.locality[0],
        mode="lines+markers",
        name="found",
        line={"color": theme.ORANGE, "width": 2},
        marker={"size": 7},
        hovertemplate="layer %{x}<br><b>%{y:.1%}</b> used by the token before<extra></extra>",
    )
    return [same_use, uniform, found]


def _by_distance(info: LocalityInfo) -> list[go.Scatter]:
    place: dict[str, object] = {"xaxis": "x2", "yaxis": "y2"}
    uniform = theme.band(
        info.distances,
        info.uniform.low,
        info.uniform.high,
        fillcolor=theme.CHANCE_BAND,
        line={"width": 1, "color": theme.INK},
        **place,
    )
    layers = theme.band(
        info.distances,
        info.locality.min(axis=1),
        info.locality.max(axis=1),
        fillcolor=theme.LINES_AND_BANDS[1][1],
        **place,
    )
    same_use = go.Scatter(
        x=info.distances,
        y=np.full(len(info.distances), info.same_use.mean()),
        mode="lines",
        line={"width": 0},
        fill="tozeroy",
        fillcolor=theme.CHANCE_BAND,
        showlegend=False,
        hovertemplate="%{y:.1%} in any order<extra></extra>",
        **place,
    )
    mean = go.Scatter(
        x=info.distances,
        y=info.locality.mean(axis=1),
        customdata=info.n_pairs,
        mode="lines+markers",
        showlegend=False,
        line={"color": theme.ORANGE, "width": 2},
        marker={"size": 7},
        hovertemplate="%{x} tokens apart<br><b>%{y:.1%}</b> used again, mean of the layers<br>"
        "%{customdata:,} pairs of tokens<extra></extra>",
        **place,
    )
    return [same_use, uniform, layers, mean]
