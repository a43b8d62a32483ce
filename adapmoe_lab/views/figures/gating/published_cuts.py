"""AdapMoE's published sensitivities, and the cuts its rule makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.policies.gating.adapmoe import adapmoe_cut, single_expert_layers
from adapmoe_lab.records import PublishedAdapMoE
from adapmoe_lab.views.figures import theme

TOP_K = 2
THRESHOLDS = (0.003, 0.007, 0.013)


@dataclass(frozen=True, eq=False)
class PublishedCutsInfo:
    """Cuts of the published rule at N thresholds.

    Attributes:
        model: the model the sensitivities are of.
        sensitivity: float64 [L], S_l.
        thresholds: T, N of them.
        cuts: float64 [N, L], cuts on the best share, 1 - sqrt(T / S_l); off above one.
        single_expert: bool [N, L], layers in which every token runs one expert.
    """

    model: str
    sensitivity: NDArray[np.float64]
    thresholds: tuple[float, ...]
    cuts: NDArray[np.float64]
    single_expert: NDArray[np.bool_]


def published_cuts_info(
    published: PublishedAdapMoE,
    thresholds: Sequence[float] = THRESHOLDS,
    model: str = "mixtral-8x7b",
) -> PublishedCutsInfo:
    """Apply AdapMoE's rule to the published sensitivities of one model.

    Raises:
        ValueError: no sensitivities of that model were published.
    """
    if model not in published.sensitivity:
        known = ", ".join(published.sensitivity)
        raise ValueError(f"No sensitivities of {model!r} were published; there are {known}.")
    sensitivity = published.sensitivity[model]
    cuts = np.stack([adapmoe_cut(threshold, sensitivity) for threshold in thresholds])
    return PublishedCutsInfo(
        model=model,
        sensitivity=sensitivity,
        thresholds=tuple(thresholds),
        cuts=cuts,
        single_expert=single_expert_layers(cuts, TOP_K),
    )


def plot_published_cuts(info: PublishedCutsInfo) -> go.Figure:
    """Draw the sensitivity of each layer, and beside it the cut at each threshold."""
    n_layers = len(info.sensitivity)
    left, right = theme.side_by_side()
    colours = theme.ordered(len(info.thresholds))
    edge = {"y0": 1 / TOP_K, "y1": 1 / TOP_K, "xref": "x2 domain", "x0": 0, "x1": 1, "yref": "y2"}
    note = {"text": "below: always one expert", "textposition": "start", "yanchor": "top"}
    return theme.draw(
        [_sensitivity(info), *(_cuts(info, i, colour) for i, colour in enumerate(colours))],
        title=f"Published sensitivities and cuts, {info.model}",
        subtitle="The second expert is skipped once the best one's share reaches the cut; "
        "the larger T, the lower",
        height=340,
        xaxis=theme.layer_axis(n_layers, domain=left),
        yaxis={"title": {"text": "published sensitivity S"}, **theme.log_axis(info.sensitivity)},
        xaxis2=theme.layer_axis(n_layers, domain=right, anchor="y2"),
        yaxis2={
            "title": {"text": "cut on the best share"},
            "range": [0, 1.02],
            "tickformat": ".0%",
            "anchor": "x2",
        },
        shapes=[{"type": "line", **edge, "line": theme.DASHED, "label": note}],
    )


def _sensitivity(info: PublishedCutsInfo) -> go.Scatter:
    return go.Scatter(
        x=np.arange(len(info.sensitivity)),
        y=info.sensitivity,
        mode="lines+markers",
        showlegend=False,
        line={"color": theme.BLUE, "width": 1.5},
        marker={"size": 6},
        hovertemplate="layer %{x}<br><b>S = %{y:.3g}</b><extra></extra>",
    )


def _cuts(info: PublishedCutsInfo, index: int, colour: str) -> go.Scatter:
    cuts, single = info.cuts[index], info.single_expert[index]
    what = np.where(cuts > 1, "nothing skipped", np.where(single, "always one expert", "gated"))
    return go.Scatter(
        x=np.arange(len(cuts)),
        y=np.where(cuts > 1, np.nan, cuts),
        customdata=what,
        xaxis="x2",
        yaxis="y2",
        mode="lines+markers",
        name=f"T = {info.thresholds[index]:g}",
        line={"color": colour, "width": 1.5},
        marker={
            "size": np.where(single, 9, 4),
            "symbol": np.where(single, "diamond", "circle"),
            "opacity": 1,
            "line": {"width": 0},
        },
        hovertemplate="layer %{x}, %{customdata}<br><b>cut %{y:.3f}</b>",
    )
