"""Where different rules put the cuts for one skipped fraction, and what each layer then skips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.records import GatingTable, RoutingTrace
from adapmoe_lab.records.spec import experts_run
from adapmoe_lab.views.figures import theme


@dataclass(frozen=True, eq=False)
class RuleCutsInfo:
    """The cuts of R rules, and what they skip of a trace.

    Attributes:
        names: of the rules.
        cuts: float64 [R, L], cut on the share; above one skips nothing.
        skipped: float64 [R, L], skipped share of each layer's expert activations.
        skipped_fraction: float64 [R], of all expert activations.
        top_k: K, experts the router chooses.
    """

    names: tuple[str, ...]
    cuts: NDArray[np.float64]
    skipped: NDArray[np.float64]
    skipped_fraction: NDArray[np.float64]
    top_k: int


def rule_cuts_info(tables: Mapping[str, GatingTable], trace: RoutingTrace) -> RuleCutsInfo:
    """Collect the cuts of gating tables by name of their rule, and apply them to a trace.

    Raises:
        ValueError: a table has other cuts than one per layer on the share.
    """
    for name, table in tables.items():
        if not table.is_one_cut_per_layer:
            raise ValueError(
                f"The table of {name!r} has more than one cut per layer, or cuts on something else "
                "than the share; there is no one line to draw."
            )
    skipped = np.array([1 - kept_experts(trace, t).mean(axis=(0, 2)) for t in tables.values()])
    return RuleCutsInfo(
        names=tuple(tables),
        cuts=np.array([table.cuts[:, 0] for table in tables.values()], dtype=np.float64),
        skipped=skipped,
        skipped_fraction=skipped.mean(axis=1),
        top_k=trace.spec.top_k,
    )


def plot_rule_cuts(info: RuleCutsInfo) -> go.Figure:
    """Draw the cut of each layer, and beside it the share of its activations that this skips."""
    n_layers = info.cuts.shape[1]
    left, right = theme.side_by_side()
    traces = []
    for i, (colour, _) in zip(range(len(info.names)), cycle(theme.LINES_AND_BANDS)):
        traces += [_cuts(info, i, colour), _skipped(info, i, colour)]
    lowest = 1 / info.top_k
    edge = {"y0": lowest, "y1": lowest, "xref": "x domain", "x0": 0, "x1": 1, "yref": "y"}
    note = {"text": "below: always one expert", "textposition": "start", "yanchor": "bottom"}
    skipped = info.skipped_fraction.mean()
    return theme.draw(
        traces,
        title="Where each rule skips",
        subtitle=f"All skip {skipped:.1%} of the expert activations: "
        f"{experts_run(info.top_k, skipped):.2f} experts per token instead of {info.top_k}",
        height=360,
        margin={"t": 84},
        legend=theme.KEY_ROW,
        xaxis=theme.layer_axis(n_layers, n_labels=10, domain=left),
        yaxis={
            "title": {"text": "cut on the share"},
            "range": [min(lowest, info.cuts.min()) - 0.04, 1.02],
            "tickformat": ".0%",
        },
        xaxis2=theme.layer_axis(n_layers, n_labels=10, domain=right, anchor="y2"),
        yaxis2={
            "title": {"text": "skipped of the layer's activations"},
            "anchor": "x2",
            "rangemode": "tozero",
            "tickformat": ".0%",
        },
        shapes=[{"type": "line", **edge, "line": theme.DASHED, "label": note}],
    )


def _cuts(info: RuleCutsInfo, index: int, colour: str) -> go.Scatter:
    cuts = info.cuts[index]
    return _line(np.where(cuts > 1, np.nan, cuts), colour, info.names[index], "cut %{y:.1%}")


def _skipped(info: RuleCutsInfo, index: int, colour: str) -> go.Scatter:
    line = _line(info.skipped[index], colour, info.names[index], "%{y:.1%} skipped")
    return line.update(xaxis="x2", yaxis="y2", showlegend=False)


def _line(values: NDArray[np.float64], colour: str, name: str, hover: str) -> go.Scatter:
    return go.Scatter(
        x=np.arange(len(values)),
        y=values,
        mode="lines+markers",
        name=name,
        line={"color": colour, "width": 2},
        marker={"size": 5},
        hovertemplate=f"layer %{{x}}<br><b>{hover}</b>",
    )
