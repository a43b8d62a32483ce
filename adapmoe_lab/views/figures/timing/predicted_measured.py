"""Predicted milliseconds per output token beside those measured."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.records import LatencyReport
from adapmoe_lab.simulation.search.prefetch_search import ms_per_token
from adapmoe_lab.simulation.simulate import Simulation
from adapmoe_lab.simulation.statistics.rank_agreement import rank_correlation
from adapmoe_lab.views.figures import theme

TOLERANCE = 0.1
"""Half the width of the band around what was predicted exactly."""
LOOKS = (
    (theme.BLUE, "circle"),
    (theme.ORANGE, "diamond"),
    (theme.GREEN, "square"),
)


@dataclass(frozen=True, eq=False)
class PredictedMeasuredInfo:
    """N configurations that were predicted and run, of one or several kinds.

    Attributes:
        kinds: [N], by which they are coloured.
        labels: [N].
        predicted_ms: float64 [N], per output token.
        measured_ms: float64 [N], median over the runs.
        spread_ms: float64 [N, 2], first and third quartile of the runs.
    """

    kinds: tuple[str, ...]
    labels: tuple[str, ...]
    predicted_ms: NDArray[np.float64]
    measured_ms: NDArray[np.float64]
    spread_ms: NDArray[np.float64]

    @property
    def error(self) -> NDArray[np.float64]:
        """Predicted over measured, less 1, float64 [N]."""
        return self.predicted_ms / self.measured_ms - 1


def predicted_measured_info(
    runs: Mapping[str, Mapping[str, tuple[Simulation, Sequence[LatencyReport]]]],
) -> PredictedMeasuredInfo:
    """Collect what was predicted and measured, by kind and label.

    Reports of one configuration count together. Where configurations take turns, the spread tells
    how much the machine changes meanwhile.

    Raises:
        ValueError: there is none, or a prediction lacks its time.
    """
    flat = [(kind, label, *pair) for kind, of in runs.items() for label, pair in of.items()]
    if not flat or any(predicted.ms_per_token is None for _, _, predicted, _ in flat):
        raise ValueError(
            "Predicted and measured times need at least one configuration, each predicted with "
            "hardware: simulate(trace, config, hardware)."
        )
    kinds, labels, predicted, measured = zip(*flat, strict=True)
    samples = [np.concatenate([each.decode.samples for each in reports]) for reports in measured]
    return PredictedMeasuredInfo(
        kinds=kinds,
        labels=labels,
        predicted_ms=np.array([ms_per_token(simulation) for simulation in predicted]),
        measured_ms=1e3 * np.array([np.median(each) for each in samples]),
        spread_ms=1e3 * np.array([np.percentile(each, [25, 75]) for each in samples]),
    )


def plot_predicted_measured(info: PredictedMeasuredInfo) -> go.Figure:
    """Draw measured over predicted times, around the diagonal on which they are equal."""
    both = np.concatenate([info.predicted_ms, info.spread_ms.ravel()])
    margin = 0.12 * max(float(np.ptp(both)), 0.1 * both.max())
    ends = np.array([max(0.0, both.min() - margin), both.max() + margin])
    kinds = dict.fromkeys(info.kinds)
    error = np.abs(info.error)
    summary = f"median error {np.median(error):.0%}, worst {error.max():.0%}"
    if len(error) > 2:
        summary += f", rank correlation {rank_correlation(info.predicted_ms, info.measured_ms):.2f}"
    return theme.draw(
        [
            theme.band(
                ends,
                (1 - TOLERANCE) * ends,
                (1 + TOLERANCE) * ends,
                fillcolor=theme.CHANCE_BAND,
                name=f"within {TOLERANCE:.0%}",
                showlegend=True,
            ),
            go.Scatter(
                x=ends, y=ends, mode="lines", name="equal", line=theme.DASHED, hoverinfo="skip"
            ),
            *(
                _points(info, kind, *LOOKS[number % len(LOOKS)])
                for number, kind in enumerate(kinds)
            ),
        ],
        title="Predicted and measured time per token",
        subtitle=f"{len(error)} configurations; {summary}; bars: quartiles of the runs",
        height=460,
        margin={"t": 100},
        legend={**theme.KEY_ROW, "y": 0.88},
        xaxis={
            "title": {"text": "predicted ms per token"},
            "range": ends,
            "showgrid": True,
        },
        yaxis={"title": {"text": "measured ms per token"}, "range": ends},
    )


def _points(info: PredictedMeasuredInfo, kind: str, colour: str, symbol: str) -> go.Scatter:
    at = [place for place, is_of in enumerate(info.kinds) if is_of == kind]
    low, high = (info.spread_ms[at] - info.measured_ms[at, None]).T
    return go.Scatter(
        x=info.predicted_ms[at],
        y=info.measured_ms[at],
        error_y={
            "array": high,
            "arrayminus": -low,
            "color": colour,
            "thickness": 1.5,
            "width": 4,
        },
        customdata=info.error[at],
        text=[html.escape(info.labels[place]) for place in at],
        textposition="bottom right",
        mode="markers+text",
        name=kind,
        marker={"size": 10, "symbol": symbol, "color": colour},
        hovertemplate="%{text}<br>predicted <b>%{x:.1f} ms</b>, measured <b>%{y:.1f} ms</b>, "
        f"%{{customdata:+.0%}}<extra>{html.escape(kind)}</extra>",
    )
