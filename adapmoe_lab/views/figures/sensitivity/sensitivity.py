"""What skipping costs in each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.records import SensitivityProfile
from adapmoe_lab.views.figures import theme

LOG_FROM_RATIO = 30.0
COST_TITLES: Mapping[str, str] = MappingProxyType(
    {"fisher": "mean ‖∂ loss / ∂ output‖² (nats²)"},
)


@dataclass(frozen=True, eq=False)
class SensitivityInfo:
    """Cost of skipping, layer by layer.

    Attributes:
        cost: float64 [L], as the estimator gives it.
        cost_se: float64 [L], its standard error.
        log_scale: whether costs differ so much that only a logarithmic axis shows them.
        cuts: float64 [L], cut on the share in each layer; above one skips nothing.
        increase_millinats: float64 [L], predicted loss increase per token at those cuts.
        increase_se_millinats: float64 [L], its standard error.
        estimator: name of the estimator of `cost`.
        n_tokens: tokens it was measured on.
    """

    cost: NDArray[np.float64]
    cost_se: NDArray[np.float64]
    log_scale: bool
    cuts: NDArray[np.float64]
    increase_millinats: NDArray[np.float64]
    increase_se_millinats: NDArray[np.float64]
    estimator: str
    n_tokens: int


def sensitivity_info(profile: SensitivityProfile, cuts: ArrayLike) -> SensitivityInfo:
    """Collect the cost per layer and the loss increase predicted at `cuts`, one or [L]."""
    cuts = np.broadcast_to(np.asarray(cuts, dtype=np.float64), (profile.n_layers,))
    increase, error = profile.increase(cuts)
    smallest, largest = float(profile.cost.min()), float(profile.cost.max())
    return SensitivityInfo(
        cost=profile.cost,
        cost_se=profile.standard_error,
        log_scale=smallest > 0 and largest > LOG_FROM_RATIO * smallest,
        cuts=cuts,
        increase_millinats=1e3 * increase,
        increase_se_millinats=1e3 * error,
        estimator=profile.estimator,
        n_tokens=profile.n_tokens,
    )


def plot_sensitivity(info: SensitivityInfo) -> go.Figure:
    """Draw the cost of each layer, and beside it the loss increase at the given cuts."""
    n_layers = len(info.cost)
    left, right = theme.side_by_side()
    total = info.increase_millinats.sum()
    where = _cut_text(info.cuts[0]) if np.ptp(info.cuts) == 0 else "the chosen cuts"
    return theme.draw(
        [_cost(info), _increase(info)],
        title="Sensitivity by layer",
        subtitle=f"Measured on {info.n_tokens:,} tokens ({info.estimator}); "
        f"at {where} all layers together cost {total:+.1f} millinats",
        showlegend=False,
        xaxis=theme.layer_axis(n_layers, domain=left),
        yaxis={
            "title": {"text": COST_TITLES.get(info.estimator, f"cost ({info.estimator})")},
            **(theme.log_axis(info.cost) if info.log_scale else {"rangemode": "tozero"}),
        },
        xaxis2=theme.layer_axis(n_layers, domain=right, anchor="y2"),
        yaxis2={
            "title": {"text": "loss increase (millinats per token)"},
            "anchor": "x2",
            "rangemode": "tozero",
        },
    )


def _cost(info: SensitivityInfo) -> go.Scatter:
    return go.Scatter(
        x=np.arange(len(info.cost)),
        y=info.cost,
        error_y=theme.error_bars(info.cost_se),
        mode="lines+markers",
        line={"color": theme.BLUE, "width": 1.5},
        marker={"size": 7},
        hovertemplate="layer %{x}<br><b>%{y:.3g}</b><extra></extra>",
    )


def _increase(info: SensitivityInfo) -> go.Bar:
    return go.Bar(
        x=np.arange(len(info.cost)),
        y=info.increase_millinats,
        error_y=theme.error_bars(info.increase_se_millinats),
        customdata=[_cut_text(cut) for cut in info.cuts],
        xaxis="x2",
        yaxis="y2",
        marker={"color": theme.ORANGE},
        hovertemplate="layer %{x}, %{customdata}<br><b>%{y:+.2f}</b> millinats<extra></extra>",
    )


def _cut_text(cut: float) -> str:
    return "nothing skipped" if cut > 1 else f"cut {cut:.2f}"
