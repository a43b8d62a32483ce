"""Whether each layer uses its experts more unevenly than chance would."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.records import RoutingTrace
from adapmoe_lab.simulation.statistics.chance import COVERAGE, Band, use_band
from adapmoe_lab.simulation.statistics.routing_patterns import effective_experts, expert_use
from adapmoe_lab.views.figures import theme

SPREAD = 0.72
"""How much of a layer's place its experts fill."""


@dataclass(frozen=True, eq=False)
class UseAgainstChanceInfo:
    """Use of every expert in units of even use, K / E of the tokens.

    Attributes:
        relative_use: float64 [L, E], use over even use.
        chance: where one expert's lies under a uniform router.
        outside: bool [L, E], uses that this does not explain.
        effective_experts: float64 [L], evenly used experts that would spread the load as widely.
        n_tokens: tokens counted.
    """

    relative_use: NDArray[np.float64]
    chance: Band
    outside: NDArray[np.bool_]
    effective_experts: NDArray[np.float64]
    n_tokens: int

    @property
    def n_outside_by_chance(self) -> float:
        """How many a uniform router would have outside, at most."""
        return (1 - COVERAGE) * self.outside.size


def use_against_chance_info(trace: RoutingTrace) -> UseAgainstChanceInfo:
    """Compare the use of every expert with a uniform router's on as many tokens."""
    n_experts, top_k = trace.spec.n_experts, trace.spec.top_k
    use = expert_use(trace.expert_indices, n_experts)
    band = use_band(trace.n_tokens, n_experts, top_k)
    even = top_k / n_experts
    return UseAgainstChanceInfo(
        relative_use=use / even,
        chance=band.over(even),
        outside=band.outside(use),
        effective_experts=effective_experts(use),
        n_tokens=trace.n_tokens,
    )


def plot_use_against_chance(info: UseAgainstChanceInfo) -> go.Figure:
    """Draw every expert as a dot, ranked within its layer, over the band of chance."""
    n_layers, n_experts = info.relative_use.shape
    span = np.array([-0.5, n_layers - 0.5])
    low, high = float(info.chance.low), float(info.chance.high)
    chance = theme.band(
        span,
        [low, low],
        [high, high],
        fillcolor=theme.CHANCE_BAND,
        name="uniform router, 95%",
        showlegend=True,
    )
    more = info.outside & (info.relative_use > 1)
    less = info.outside & (info.relative_use < 1)
    groups = [
        (more, theme.ABOVE[1], "more"),
        (less, theme.BELOW[0], "less"),
        (~info.outside, theme.FAINT, "as by chance"),
    ]
    return theme.draw(
        [chance, *(_dots(info, *group) for group in groups)],
        title="Expert use against chance",
        subtitle=f"{info.outside.sum()} of {info.outside.size} outside the band, "
        f"at most {info.n_outside_by_chance:.0f} by chance; "
        f"{info.effective_experts.min():.1f} to {info.effective_experts.max():.1f} effective "
        f"experts of {n_experts}",
        height=360,
        margin={"t": 84},
        legend=theme.KEY_ROW,
        xaxis=theme.layer_axis(n_layers),
        yaxis={"title": {"text": "use / even use"}, "rangemode": "tozero", "tickprefix": "×"},
    )


def _dots(
    info: UseAgainstChanceInfo, shown: NDArray[np.bool_], colour: str, name: str
) -> go.Scatter:
    n_layers, n_experts = info.relative_use.shape
    ranks = np.argsort(np.argsort(-info.relative_use, axis=1, kind="stable"), axis=1)
    places = SPREAD * ((ranks + 0.5) / n_experts - 0.5)
    layers, experts = np.nonzero(shown)
    return go.Scatter(
        x=layers + places[shown],
        y=info.relative_use[shown],
        customdata=np.stack([layers, experts], axis=1),
        mode="markers",
        name=name,
        marker={"color": colour, "size": 6 if n_layers * n_experts <= 1024 else 3},
        hovertemplate="layer %{customdata[0]}, expert %{customdata[1]}<br>"
        "<b>%{y:.2f}</b> of even use<extra></extra>",
    )
