"""How often each layer uses each of its experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.records import RoutingTrace
from adapmoe_lab.simulation.statistics.routing_patterns import expert_use
from adapmoe_lab.views.figures import theme


@dataclass(frozen=True, eq=False)
class ExpertUseInfo:
    """Use of every expert.

    Attributes:
        use: float64 [L, E], fraction of tokens routed to the expert; a row sums to K.
        uniform_use: K / E, what every expert would get under even use.
        n_tokens: tokens counted.
        model_id: the model that was recorded.
    """

    use: NDArray[np.float64]
    uniform_use: float
    n_tokens: int
    model_id: str


def expert_use_info(trace: RoutingTrace) -> ExpertUseInfo:
    """Count how many tokens the router sends to each expert, before gating."""
    return ExpertUseInfo(
        use=expert_use(trace.expert_indices, trace.spec.n_experts),
        uniform_use=trace.spec.top_k / trace.spec.n_experts,
        n_tokens=trace.n_tokens,
        model_id=trace.spec.model_id,
    )


def plot_expert_use(info: ExpertUseInfo) -> go.Figure:
    """Draw use as a map of layers by experts; even use is the neutral colour."""
    n_layers, n_experts = info.use.shape
    top = max(2 * info.uniform_use, float(info.use.max()))
    cells = go.Heatmap(
        z=info.use,
        zmin=0,
        zmax=top,
        colorscale=theme.diverging(info.uniform_use / top),
        colorbar=theme.colour_bar(
            "tokens routed there",
            tickvals=[0, info.uniform_use, top],
            ticktext=["0%", f"{info.uniform_use:.0%} (even)", f"{top:.0%}"],
        ),
        hovertemplate=(
            "layer %{y}, expert %{x}<br><b>%{z:.1%}</b> of tokens"
            f" (even use: {info.uniform_use:.1%})<extra></extra>"
        ),
    )
    return theme.draw(
        [cells],
        title="Expert use",
        subtitle=f"Tokens each expert is chosen for, of {info.n_tokens:,}; "
        f"even use is {info.uniform_use:.1%}",
        height=theme.heatmap_height(n_layers),
        xaxis={"title": {"text": "expert"}, "range": [-0.5, n_experts - 0.5]},
        yaxis=theme.layer_axis(n_layers, range=[n_layers - 0.5, -0.5], showgrid=False),
    )
