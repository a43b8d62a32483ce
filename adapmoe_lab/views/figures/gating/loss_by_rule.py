"""What skipping more and more costs under each rule, predicted and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.policies.gating.rule import Rule
from adapmoe_lab.records import LossReport, SensitivityProfile
from adapmoe_lab.records.standard_error import nan_if_unknown
from adapmoe_lab.views.figures import theme

N_PREDICTED = 25
SHARE_PREDICTED = 0.9
"""How much of all that can be skipped the lines cover; beyond it the last experts go."""
APART = 0.008
"""Distance of points of one fraction that would hide each other, as a share of the axis."""


@dataclass(frozen=True, eq=False)
class RuleLoss:
    """One rule: N predictions and M measurements, in millinats per token.

    Attributes:
        skipped: float64 [N], fraction of all expert activations.
        predicted: float64 [N], loss increase.
        predicted_se: float64 [N], its standard error; NaN, here and below, if not known.
        measured_skipped: float64 [M], what was skipped where it was measured.
        measured: float64 [M], loss increase.
        measured_se: float64 [M], its standard error, paired by text.
    """

    skipped: NDArray[np.float64]
    predicted: NDArray[np.float64]
    predicted_se: NDArray[np.float64]
    measured_skipped: NDArray[np.float64]
    measured: NDArray[np.float64]
    measured_se: NDArray[np.float64]


@dataclass(frozen=True)
class LossByRuleInfo:
    """Loss against skipping.

    Attributes:
        rules: by name.
        n_predicted_on: tokens the predictions were learnt on.
        n_measured_on: tokens measured.
    """

    rules: Mapping[str, RuleLoss]
    n_predicted_on: int
    n_measured_on: int


def loss_by_rule_info(
    rules: Mapping[str, Rule],
    sensitivity: SensitivityProfile,
    measured: Mapping[str, Sequence[LossReport]],
    baseline: LossReport,
    *,
    skipped_fractions: ArrayLike | None = None,
) -> LossByRuleInfo:
    """Predict each rule's loss over skipped fractions, and collect what was measured.

    Args:
        rules: prepared rules by name.
        sensitivity: what predicts.
        measured: losses under tables of those rules, by name; may lack some.
        baseline: the loss of the same texts with nothing skipped.
        skipped_fractions: where to predict; most of what can be skipped if None.

    Raises:
        ValueError: there are measurements of an unknown rule.
    """
    unknown = ", ".join(sorted(set(measured) - set(rules)))
    if unknown:
        raise ValueError(f"Losses were measured of {unknown}; the rules are {', '.join(rules)}.")
    if skipped_fractions is None:
        most = float(sensitivity.skipped.max(axis=1).mean())
        skipped_fractions = np.linspace(0, SHARE_PREDICTED * most, N_PREDICTED)
    fractions = np.asarray(skipped_fractions, dtype=np.float64)
    return LossByRuleInfo(
        {
            name: _of_rule(rule, sensitivity, fractions, measured.get(name, ()), baseline)
            for name, rule in rules.items()
        },
        sensitivity.n_tokens,
        int(baseline.n_predicted.sum()),
    )


def _of_rule(
    rule: Rule,
    sensitivity: SensitivityProfile,
    fractions: NDArray[np.float64],
    reports: Sequence[LossReport],
    baseline: LossReport,
) -> RuleLoss:
    tables = [rule.table(fraction) for fraction in fractions.tolist()]
    predicted = [sensitivity.total_increase(table.cuts[:, 0]) for table in tables]
    measured = [report.increase_over(baseline) for report in reports]
    return RuleLoss(
        fractions,
        *_millinats(predicted),
        np.array([report.skipped_fraction for report in reports]),
        *_millinats(measured),
    )


def _millinats(values: Sequence[tuple[float, float | None]]) -> NDArray[np.float64]:
    """Return values [N] and their errors [N], NaN where an error is not known, as [2, N]."""
    return 1e3 * nan_if_unknown(values).reshape(-1, 2).T


def plot_loss_by_rule(info: LossByRuleInfo) -> go.Figure:
    """Draw predictions as lines in bands of their error, measurements as diamonds beside them."""
    span = max(float(rule.skipped.max()) for rule in info.rules.values())
    bands, lines, points = [], [], []
    looks = zip(info.rules.items(), cycle(theme.LINES_AND_BANDS))
    for i, ((name, rule), (colour, band)) in enumerate(looks):
        low, high = (rule.predicted + s * rule.predicted_se for s in (-1, 1))
        bands.append(theme.band(rule.skipped, low, high, fillcolor=band))
        lines.append(_predicted(name, rule, colour))
        beside = APART * span * (i - (len(info.rules) - 1) / 2)
        points.append(_measured(name, rule, colour, beside))
    return theme.draw(
        [*bands, *lines, *points],
        title="Loss against skipping",
        subtitle=f"Lines: predicted from {info.n_predicted_on:,} tokens; diamonds: measured on "
        f"{info.n_measured_on:,}; bands and bars: standard error",
        height=400,
        margin={"t": 84},
        legend=theme.KEY_ROW,
        xaxis={
            "title": {"text": "expert activations skipped"},
            "range": [-0.02 * span, 1.03 * span],
            "tickformat": ".0%",
        },
        yaxis={
            "title": {"text": "loss increase (millinats per token)"},
            "zeroline": True,
            "zerolinecolor": theme.FAINT,
        },
    )


def _predicted(name: str, rule: RuleLoss, colour: str) -> go.Scatter:
    return go.Scatter(
        x=rule.skipped,
        y=rule.predicted,
        customdata=theme.error_texts(rule.predicted_se, ".1f"),
        mode="lines",
        name=name,
        line={"color": colour, "width": 2},
        hovertemplate="%{x:.1%} skipped<br><b>%{y:+.1f}</b> %{customdata} millinats predicted",
    )


def _measured(name: str, rule: RuleLoss, colour: str, beside: float) -> go.Scatter:
    return go.Scatter(
        x=rule.measured_skipped + beside,
        y=rule.measured,
        customdata=np.stack(
            [rule.measured_skipped, theme.error_texts(rule.measured_se, ".1f")], axis=1
        ),
        error_y={**theme.error_bars(rule.measured_se, colour), "thickness": 1.5},
        mode="markers",
        name=name,
        showlegend=False,
        marker={"color": colour, "size": 10, "symbol": "diamond"},
        hovertemplate="%{customdata[0]:.1%} skipped<br><b>%{y:+.1f}</b> %{customdata[1]} "
        "millinats measured",
    )
