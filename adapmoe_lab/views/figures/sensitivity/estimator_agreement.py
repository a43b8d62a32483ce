"""Whether an estimate ranks layers as they were measured, and what cuts chosen by it would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.policies.gating.least_loss import LeastLoss
from adapmoe_lab.policies.gating.uniform import UniformCut
from adapmoe_lab.records import RoutingTrace, SensitivityProfile
from adapmoe_lab.simulation.statistics.chance import Band
from adapmoe_lab.simulation.statistics.layer_costs import layer_costs
from adapmoe_lab.simulation.statistics.rank_agreement import (
    random_order_band,
    rank_correlation,
    repeatability,
)
from adapmoe_lab.views.figures import theme
from adapmoe_lab.views.figures.sensitivity.sensitivity_shares import check_reference

REFERENCES = ("divergence", "ablation")
MARKERS = ((theme.BLUE, "circle"), (theme.ORANGE, "square"))
HEIGHT_PER_ESTIMATOR = 36
ROOM_FOR_LABELS = 0.6
"""Below the last estimator, in rows."""


@dataclass(frozen=True, eq=False)
class EstimatorAgreementInfo:
    """How N estimators agree with M references, and what choosing by them costs.

    Attributes:
        names: of the estimators.
        references: of those they are judged by; the first judges costs.
        correlation: float64 [M, N], Spearman's rank correlation over layers; NaN with itself.
        repeatability: float64 [N], with a repeat of itself on as many other texts, as its errors
            let expect.
        chance: where it lies for layers in random order.
        cost_millinats: float64 [N], summed over layers as the first reference measured it, where
            cuts chosen by the estimator skip `skipped_fraction` at its least loss.
        cost_se_millinats: float64 [N], its standard error.
        one_cut_millinats: the same of one cut for all layers.
        skipped_fraction: skipped expert activations over all the router chose.
    """

    names: tuple[str, ...]
    references: tuple[str, ...]
    correlation: NDArray[np.float64]
    repeatability: NDArray[np.float64]
    chance: Band
    cost_millinats: NDArray[np.float64]
    cost_se_millinats: NDArray[np.float64]
    one_cut_millinats: float
    skipped_fraction: float


def estimator_agreement_info(
    profiles: Mapping[str, SensitivityProfile],
    trace: RoutingTrace,
    skipped_fraction: float = 0.25,
    references: Sequence[str] = REFERENCES,
) -> EstimatorAgreementInfo:
    """Judge estimators by those that measured.

    Args:
        profiles: by name of the estimator, as `lab.sensitivities` returns them.
        trace: routing of the same texts, for which cuts are chosen.
        skipped_fraction: what each layer alone skips where layers are ranked, and all together
            where cuts are chosen.
        references: names of the estimators that judge; the first is to be the surest.

    Raises:
        ValueError: a reference is not among the profiles, or not as much can be skipped.
    """
    for reference in references:
        check_reference(reference, profiles)
    costs = {name: layer_costs(p, skipped_fraction) for name, p in profiles.items()}
    correlation = [
        [rank_correlation(costs[n][0], costs[r][0]) if n != r else np.nan for n in profiles]
        for r in references
    ]
    judge = profiles[references[0]].uncorrected()
    rules = [LeastLoss(trace, profile) for profile in profiles.values()]
    judged = [
        judge.total_increase(rule.table(skipped_fraction).cuts[:, 0])
        for rule in (*rules, UniformCut(trace))
    ]
    cost, error = 1e3 * np.array(judged, dtype=np.float64).T
    return EstimatorAgreementInfo(
        names=tuple(profiles),
        references=tuple(references),
        correlation=np.array(correlation),
        repeatability=np.array([repeatability(*costs[name]) for name in profiles]),
        chance=random_order_band(judge.n_layers),
        cost_millinats=cost[:-1],
        cost_se_millinats=error[:-1],
        one_cut_millinats=float(cost[-1]),
        skipped_fraction=skipped_fraction,
    )


def plot_estimator_agreement(info: EstimatorAgreementInfo) -> go.Figure:
    """Draw rank correlations over those of chance, and beside them what cuts by each would cost."""
    left, right = theme.side_by_side(0.06)
    n = len(info.names)
    rows = {"range": [n - 0.5 + ROOM_FOR_LABELS, -0.5]}
    best, worst = int(np.argmin(info.cost_millinats)), int(np.argmax(info.cost_millinats))
    return theme.draw(
        [*_correlations(info), _costs(info)],
        title="Does an estimate know the order, and does it matter?",
        subtitle=f"Cuts that skip {100 * info.skipped_fraction:g}% cost "
        f"{info.cost_millinats[best]:.2f} millinats by {info.names[best]} to "
        f"{info.cost_millinats[worst]:.2f} by {info.names[worst]}",
        height=180 + HEIGHT_PER_ESTIMATOR * n,
        margin={"t": 106},
        legend={**theme.KEY_ROW, "y": 0.85},
        annotations=[
            theme.panel_title(left, "rank correlation over layers"),
            theme.panel_title(right, f"cost of cuts chosen by it, as {info.references[0]} has it"),
        ],
        xaxis={
            "title": {"text": "Spearman's rank correlation"},
            "range": [-1.06, 1.06],
            "showgrid": True,
            "domain": left,
        },
        yaxis=rows,
        xaxis2={
            "title": {"text": "loss increase (millinats per token)"},
            "rangemode": "tozero",
            "showgrid": True,
            "domain": right,
            "anchor": "y2",
        },
        yaxis2={**rows, "anchor": "x2", "matches": "y", "showticklabels": False},
        shapes=[_chance(info.chance), _one_cut(info)],
    )


def _chance(band: Band) -> dict[str, object]:
    return {
        "type": "rect",
        "x0": float(band.low),
        "x1": float(band.high),
        "yref": "y domain",
        "y0": 0,
        "y1": 1,
        "fillcolor": theme.CHANCE_BAND,
        "line": {"width": 0},
        "layer": "below",
        "label": {"text": "random order, 95%", "textposition": "bottom center"},
    }


def _one_cut(info: EstimatorAgreementInfo) -> dict[str, object]:
    millinats = info.one_cut_millinats
    has_room_right = millinats < 0.5 * info.cost_millinats.max()
    return {
        "type": "line",
        "xref": "x2",
        "x0": millinats,
        "x1": millinats,
        "yref": "y2 domain",
        "y0": 0,
        "y1": 1,
        "line": theme.DASHED,
        "label": {
            "text": "one cut for all layers",
            "textposition": "start",
            "textangle": 0,
            "xanchor": "left" if has_room_right else "right",
            "padding": 5,
        },
    }


def _correlations(info: EstimatorAgreementInfo) -> list[go.Scatter]:
    with_references = [
        _dots(info.names, values, f"with {reference}", *marker)
        for reference, values, marker in zip(info.references, info.correlation, cycle(MARKERS))
    ]
    name = "with a repeat of itself"
    repeats = _dots(info.names, info.repeatability, name, theme.INK, "line-ns-open")
    return [*with_references, repeats]


def _dots(
    names: Sequence[str], values: NDArray[np.float64], name: str, colour: str, symbol: str
) -> go.Scatter:
    return go.Scatter(
        x=values,
        y=names,
        mode="markers",
        name=name,
        marker={
            "color": colour,
            "size": 10,
            "symbol": symbol,
            "line": {"color": colour, "width": 2},
        },
        hovertemplate=f"%{{y}} {name}<br><b>%{{x:.2f}}</b><extra></extra>",
    )


def _costs(info: EstimatorAgreementInfo) -> go.Bar:
    return go.Bar(
        x=info.cost_millinats,
        y=info.names,
        orientation="h",
        xaxis="x2",
        yaxis="y2",
        customdata=theme.error_texts(info.cost_se_millinats, ".2f"),
        error_x=theme.error_bars(info.cost_se_millinats),
        marker={"color": theme.GREEN},
        showlegend=False,
        hovertemplate="cuts by %{y}<br><b>%{x:.2f}</b> %{customdata} millinats<extra></extra>",
    )
