"""AdapMoE's published accuracy against what its rule skips, in both units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from types import MappingProxyType

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.records import PublishedAdapMoE, PublishedRun
from adapmoe_lab.views.figures import theme

CLAIMED_RATIO = 0.25
"""What the paper calls a quarter fewer activated experts: its single-expert ratio."""
NAMES: Mapping[str, str] = MappingProxyType(
    {
        "lm_eval_mmlu_0shot_8x7b_nf4": "0-shot (lm-eval)",
        "cot_hub_mmlu_5shot_8x7b_nf4": "5-shot (chain-of-thought-hub)",
    }
)


@dataclass(frozen=True, eq=False)
class AccuracyCurve:
    """The N runs of one evaluation, in ascending order of T.

    Attributes:
        name: the evaluation.
        threshold: float64 [N], T.
        skipped_fraction: float64 [N], skipped expert activations over all the router chose.
        single_expert_ratio: float64 [N], share of tokens run with one expert: twice that.
        experts_per_token: float64 [N].
        accuracy: float64 [N], share of questions answered right.
        accuracy_se: float64 [N], its standard error over questions.
    """

    name: str
    threshold: NDArray[np.float64]
    skipped_fraction: NDArray[np.float64]
    single_expert_ratio: NDArray[np.float64]
    experts_per_token: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    accuracy_se: NDArray[np.float64]


@dataclass(frozen=True)
class PublishedAccuracyInfo:
    """MMLU accuracy against skipping, one curve per evaluation.

    Attributes:
        curves: the evaluations.
        claimed_ratio: the single-expert ratio that the paper calls 25 % fewer experts.
    """

    curves: tuple[AccuracyCurve, ...]
    claimed_ratio: float = CLAIMED_RATIO

    @property
    def claimed_skipped_fraction(self) -> float:
        """What that ratio skips of all expert activations: half of it, for a top-2 model."""
        return self.claimed_ratio / 2


def published_accuracy_info(published: PublishedAdapMoE) -> PublishedAccuracyInfo:
    """Collect the published MMLU runs, with what they skip in both units."""
    return PublishedAccuracyInfo(
        tuple(_curve(NAMES.get(name, name), runs) for name, runs in published.mmlu.items())
    )


def _curve(name: str, runs: tuple[PublishedRun, ...]) -> AccuracyCurve:
    return AccuracyCurve(
        name=name,
        threshold=np.array([run.threshold for run in runs]),
        skipped_fraction=np.array([run.skipped_fraction for run in runs]),
        single_expert_ratio=np.array([run.mean_single_expert_ratio for run in runs]),
        experts_per_token=np.array([run.experts_per_token for run in runs]),
        accuracy=np.array([run.accuracy for run in runs]),
        accuracy_se=np.array([run.accuracy_se for run in runs]),
    )


def plot_published_accuracy(info: PublishedAccuracyInfo) -> go.Figure:
    """Draw accuracy against experts skipped; the paper's own unit is the axis above."""
    claimed = info.claimed_skipped_fraction
    traces = []
    for curve, (line, band) in zip(info.curves, cycle(theme.LINES_AND_BANDS)):
        traces += [_band(curve, band), _line(curve, line)]
    most = max(float(curve.skipped_fraction.max()) for curve in info.curves)
    span = np.array([-0.02, 1.06]) * most
    return theme.draw(
        [*traces, _upper_axis(span)],
        title="Published MMLU accuracy, mixtral-8x7b",
        subtitle=f"{info.claimed_ratio:.0%} of tokens on one expert are 2 → "
        f"{2 - info.claimed_ratio:g} experts: {claimed:.1%} fewer, not {info.claimed_ratio:.0%}",
        height=400,
        margin={"t": 108},
        xaxis={
            "title": {"text": "expert activations skipped"},
            "range": list(span),
            "tickformat": ".1~%",
            "dtick": 0.025,
            "tick0": 0,
        },
        xaxis2={
            "title": {"text": "tokens run with one expert (the paper's percentage)"},
            "range": list(2 * span),
            "tickformat": ".0%",
            "dtick": 0.05,
            "tick0": 0,
            "overlaying": "x",
            "side": "top",
        },
        yaxis={"title": {"text": "MMLU accuracy"}, "tickformat": ".1%"},
        shapes=[_claim_line(claimed, info.claimed_ratio)],
    )


def _claim_line(skipped: float, ratio: float) -> dict[str, object]:
    return {
        "type": "line",
        "x0": skipped,
        "x1": skipped,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": theme.DASHED,
        "label": {
            "text": f"“{ratio:.0%} fewer experts”",
            "textposition": "start",
            "textangle": 0,
            "xanchor": "left",
            "padding": 6,
        },
    }


def _band(curve: AccuracyCurve, colour: str) -> go.Scatter:
    low, high = curve.accuracy - curve.accuracy_se, curve.accuracy + curve.accuracy_se
    return theme.band(curve.skipped_fraction, low, high, fillcolor=colour)


def _line(curve: AccuracyCurve, colour: str) -> go.Scatter:
    return go.Scatter(
        x=curve.skipped_fraction,
        y=curve.accuracy,
        customdata=np.stack(
            [
                curve.threshold,
                curve.single_expert_ratio,
                curve.experts_per_token,
                curve.accuracy_se,
            ],
            axis=1,
        ),
        mode="lines+markers",
        name=curve.name,
        line={"color": colour, "width": 2},
        marker={"size": 7},
        hovertemplate="T = %{customdata[0]:g}: <b>%{x:.1%} of activations skipped</b><br>"
        "%{customdata[1]:.1%} of tokens on one expert, %{customdata[2]:.2f} experts per token<br>"
        "<b>%{y:.2%}</b> ± %{customdata[3]:.2%} right",
    )


def _upper_axis(span: NDArray[np.float64]) -> go.Scatter:
    """Return a trace that shows nothing: an axis without one is not drawn."""
    return go.Scatter(x=2 * span, y=[None, None], xaxis="x2", showlegend=False, hoverinfo="skip")
