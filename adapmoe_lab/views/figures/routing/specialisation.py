"""Whether experts specialise in kinds of text."""

from __future__ import annotations

import html
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.records import RoutingTrace
from adapmoe_lab.simulation.statistics.chance import Band, information_band, shuffled_counts
from adapmoe_lab.simulation.statistics.routing_patterns import (
    counts_by_label,
    label_information,
    use_by_sequence,
)
from adapmoe_lab.views.figures import theme
from adapmoe_lab.views.figures.routing.lift import bound_of, lift_cells


@dataclass(frozen=True, eq=False)
class SpecialisationInfo:
    """What an expert tells about the kind of text, D kinds in all.

    Attributes:
        labels: the kinds.
        information_bits: float64 [L], mutual information of kind and expert.
        label_bits: entropy of the kinds, what would tell them for certain.
        uniform: what a uniform router would seem to tell, for its finite sample.
        shuffled: what the same routing tells of labels dealt out anew over texts, [L].
        layer: the layer shown by kind.
        lift: float64 [D, E], use of that layer's experts by kind over their use in all text.
        outside: bool [D, E], lifts that labels dealt out anew do not explain.
        n_sequences: texts compared.
    """

    labels: tuple[str, ...]
    information_bits: NDArray[np.float64]
    label_bits: float
    uniform: Band
    shuffled: Band
    layer: int
    lift: NDArray[np.float64]
    outside: NDArray[np.bool_]
    n_sequences: int

    @property
    def excess_bits(self) -> NDArray[np.float64]:
        """Information about the kind itself, float64 [L]; what shuffled labels tell is off."""
        return self.information_bits - self.shuffled.mean


def specialisation_info(trace: RoutingTrace, layer: int | None = None) -> SpecialisationInfo:
    """Measure what experts tell about the labels of the trace's texts, against chance.

    Args:
        trace: recorded routing, several texts of each kind.
        layer: the layer to show by kind; None for the one that tells the most.

    Raises:
        ValueError: the labels do not put the texts into at least two kinds.
    """
    labels, kinds = np.unique(np.array(trace.labels), return_inverse=True)
    if not 1 < len(labels) < len(kinds):
        raise ValueError(
            f"Specialisation compares kinds of text, but the {len(kinds)} texts of this trace "
            f"have {len(labels)} different labels; pass lab.profile(..., labels=...) the kind of "
            "each text, at least two kinds with several texts."
        )
    by_sequence = use_by_sequence(trace)
    counts = counts_by_label(by_sequence, kinds, len(labels))  # [L, D, E]
    information = label_information(counts)
    shown = int(information.argmax()) if layer is None else layer
    shuffled = shuffled_counts(by_sequence, kinds, len(labels))  # [R, L, D, E]
    lift = _lift(counts[shown])
    lengths = np.diff(np.append(trace.sequence_starts, trace.n_tokens))
    n_tokens = np.bincount(kinds, weights=lengths).astype(np.int64)  # [D]
    share = n_tokens / n_tokens.sum()
    return SpecialisationInfo(
        labels=tuple(str(label) for label in labels),
        information_bits=information,
        label_bits=float(-(share * np.log2(share)).sum()),
        uniform=information_band(n_tokens.tolist(), trace.spec.n_experts, trace.spec.top_k),
        shuffled=Band.of_draws(np.stack([label_information(draw) for draw in shuffled])),
        layer=shown,
        lift=lift,
        outside=Band.of_draws(_lift(shuffled[:, shown])).outside(lift),
        n_sequences=len(kinds),
    )


def _lift(counts: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return use by kind over use in all text, [..., D, E]; one for an expert nothing uses."""
    rows, columns = counts.sum(axis=-1, keepdims=True), counts.sum(axis=-2, keepdims=True)
    expected = rows * columns / counts.sum(axis=(-2, -1), keepdims=True)
    return np.divide(counts, expected, out=np.ones(counts.shape), where=expected > 0)


def plot_specialisation(info: SpecialisationInfo) -> go.Figure:
    """Draw the information of each layer over chance, and beside it one layer by kind."""
    n_layers, n_experts = len(info.information_bits), info.lift.shape[1]
    left, right = theme.side_by_side(0.26)
    return theme.draw(
        [*_information(info), _by_kind(info)],
        title="Specialisation in kinds of text",
        subtitle=f"What one expert of one token tells about the kind of its text; "
        f"{info.label_bits:.2f} bits would tell it",
        height=380,
        margin={"t": 106},
        annotations=[
            theme.panel_title(left, "by layer"),
            theme.panel_title(right, f"use by kind over use in all text, layer {info.layer}"),
        ],
        legend=theme.KEY_ROW,
        xaxis=theme.layer_axis(n_layers, domain=left),
        yaxis={"title": {"text": "information (bits)"}, "rangemode": "tozero"},
        xaxis2=theme.numbered_axis("expert", n_experts, 8, domain=right, anchor="y2"),
        yaxis2={
            "title": {"text": "kind of text"},
            "range": [len(info.labels) - 0.5, -0.5],
            "tickvals": np.arange(len(info.labels)),
            "ticktext": [html.escape(label) for label in info.labels],
            "showgrid": False,
            "anchor": "x2",
        },
    )


def _information(info: SpecialisationInfo) -> list[go.Scatter]:
    layers = np.arange(len(info.information_bits))
    uniform, shuffled = info.uniform, info.shuffled
    return [
        theme.band(
            layers,
            shuffled.low,
            shuffled.high,
            fillcolor=theme.CHANCE_BAND,
            name="labels shuffled, 95%",
            showlegend=True,
        ),
        theme.band(
            layers,
            np.full(len(layers), uniform.low),
            np.full(len(layers), uniform.high),
            fillcolor=theme.INK,
            line={"width": 1.5, "color": theme.INK},
            name="uniform router, 95%",
            showlegend=True,
        ),
        go.Scatter(
            x=layers,
            y=info.information_bits,
            mode="lines+markers",
            name="found",
            customdata=np.stack([shuffled.mean, info.excess_bits], axis=1),
            line={"color": theme.ORANGE, "width": 2},
            marker={"size": 7},
            hovertemplate="layer %{x}<br><b>%{y:.3f} bits</b><br>"
            "%{customdata[0]:.3f} with labels shuffled<br>"
            "%{customdata[1]:.3f} about the kind itself<extra></extra>",
        ),
    ]


def _by_kind(info: SpecialisationInfo) -> go.Heatmap:
    texts = [
        [f"{html.escape(label)}, expert {e}<br><b>×{lift:.2f}</b>" for e, lift in enumerate(row)]
        for label, row in zip(info.labels, info.lift, strict=True)
    ]
    bound = bound_of(info.lift[info.outside])
    return lift_cells(info.lift, info.outside, bound, text=texts, xaxis="x2", yaxis="y2")
