"""Whether what layers cost alone adds up to what they cost together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.records import SensitivityProfile
from adapmoe_lab.views.figures import theme

TICKS = (0.001, 0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 100, 1000)


@dataclass(frozen=True, eq=False)
class LayerSums:
    """One estimator's sums where all layers skipped at once, A times.

    Attributes:
        measured_millinats: float64 [A], divergence with all layers skipping, ascending.
        ratio: float64 [A], what the layers' curves add up to, over that.
        ratio_se: float64 [A], standard error by that of the measurement.
    """

    measured_millinats: NDArray[np.float64]
    ratio: NDArray[np.float64]
    ratio_se: NDArray[np.float64]


@dataclass(frozen=True)
class SumOfLayersInfo:
    """Sums over layers against what was measured.

    Attributes:
        sums: by estimator; those whose sums never rise are left out.
        n_tokens: tokens all were measured on.
    """

    sums: Mapping[str, LayerSums]
    n_tokens: int


def sum_of_layers_info(profiles: Mapping[str, SensitivityProfile]) -> SumOfLayersInfo:
    """Collect the anchors of profiles by name of the estimator.

    Raises:
        ValueError: no profile has anchors.
    """
    sums = {name: _sums(p) for name, p in profiles.items() if len(p.anchors)}
    if not sums:
        raise ValueError(
            "No profile was measured with all layers skipping; use lab.sensitivities(..., "
            "anchored=True)."
        )
    return SumOfLayersInfo(sums, max(profile.n_tokens for profile in profiles.values()))


def _sums(profile: SensitivityProfile) -> LayerSums:
    estimated, measured, error = profile.anchors.T
    ratio = estimated / measured
    return LayerSums(1e3 * measured, ratio, ratio * error / measured)


def plot_sum_of_layers(info: SumOfLayersInfo) -> go.Figure:
    """Draw the ratio of sum to measurement over what was measured; at one they agree."""
    colours = zip(info.sums.items(), cycle(theme.PAIRED))
    ratios = np.concatenate([sums.ratio for sums in info.sums.values()])
    measured = np.concatenate([sums.measured_millinats for sums in info.sums.values()])
    at_one = {"y0": 1, "y1": 1, "xref": "paper", "x0": 0, "x1": 1, "yref": "y"}
    return theme.draw(
        [_line(name, sums, colour) for (name, sums), colour in colours],
        title="Do the layers' costs add up?",
        subtitle="Sum of what each layer costs alone, over what was measured with all of them "
        f"skipping at one cut; {info.n_tokens:,} tokens",
        height=360,
        margin={"t": 84},
        legend=theme.KEY_ROW,
        xaxis={
            "title": {"text": "measured divergence, all layers skipping (millinats per token)"},
            **theme.log_axis(measured),
        },
        yaxis={
            "title": {"text": "sum / measured"},
            "type": "log",
            "tickvals": TICKS,
            "ticktext": [f"×{tick:g}" for tick in TICKS],
            "range": np.log10([0.9 * min(0.5, ratios.min()), 1.1 * max(2, ratios.max())]).tolist(),
        },
        shapes=[{"type": "line", **at_one, "line": theme.DASHED}],
    )


def _line(name: str, sums: LayerSums, colour: str) -> go.Scatter:
    return go.Scatter(
        x=sums.measured_millinats,
        y=sums.ratio,
        customdata=theme.error_texts(sums.ratio_se, ".2f"),
        error_y=theme.error_bars(sums.ratio_se, colour),
        mode="lines+markers",
        name=name,
        line={"color": colour, "width": 2},
        marker={"size": 7},
        hovertemplate=f"{name}, %{{x:.2g}} millinats measured<br><b>×%{{y:.2f}}</b> "
        "%{customdata}<extra></extra>",
    )
