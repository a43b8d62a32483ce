"""How well each predictor predicts the experts of each layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.records import GatingTable, RoutingTrace
from adapmoe_lab.simulation.statistics.predictability import recall_and_precision
from adapmoe_lab.views.figures import theme

MEANINGS = {
    "frequency": "most used experts",
    "last_hidden": "gate on the last hidden state",
    "next_router": "next router",
    "own_norm": "own norm and router after the layer",
    "previous_token": "experts of the token before",
    "ridge": "linear map",
    "token_embedding": "token's embedding, own norm and router",
    "token_table": "table of tokens",
    "token_table_all": "table of tokens for every layer",
}
"""What predictors are called in figures, by the name in traces."""


@dataclass(frozen=True, eq=False)
class PredictabilityInfo:
    """Recall of P predictors in L layers, the best first; a distance counts as another predictor.

    Attributes:
        names: of the predictors, with the distance they look.
        recall: float64 [P, L], share of the needed experts predicted; NaN where none is predicted.
        recall_se: float64 [P, L], standard error over texts; NaN if not known.
        precision: float64 [P, L], share of the predicted experts that are needed.
        mean_recall: float64 [P], over the layers that are predicted.
        n_candidates: experts that count as predicted; None for what a gating would keep.
        n_tokens: tokens of the trace.
        n_texts: its texts.
    """

    names: tuple[str, ...]
    recall: NDArray[np.float64]
    recall_se: NDArray[np.float64]
    precision: NDArray[np.float64]
    mean_recall: NDArray[np.float64]
    n_candidates: int | None
    n_tokens: int
    n_texts: int


def predictability_info(
    trace: RoutingTrace, gating: GatingTable | None = None, candidates: int | None = None
) -> PredictabilityInfo:
    """Compare everything that a trace holds predictions of with what was needed.

    Args:
        trace: recorded routing, with baselines if they are wanted
            (`lab.with_baselines`).
        gating: what of the router's choice is needed; all of it if None.
        candidates: experts that count as predicted; if None the router's K, or under a gating
            those of them that it would keep by the predicted scores.

    Raises:
        ValueError: the trace holds no predictions, or too few candidates.
    """
    pairs = [(name, distance) for name, ds in trace.predictions.items() for distance in ds]
    if not pairs:
        raise ValueError("The trace holds no predictions; record it again with lab.profile.")
    found = [recall_and_precision(trace, *pair, gating, candidates) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda place: -found[place].mean_recall[0])
    top_k = None if gating is not None else trace.spec.top_k
    return PredictabilityInfo(
        names=tuple(_named(*pairs[place]) for place in order),
        recall=np.stack([found[place].recall for place in order]),
        recall_se=np.stack([found[place].recall_se for place in order]),
        precision=np.stack([found[place].precision for place in order]),
        mean_recall=np.array([found[place].mean_recall[0] for place in order]),
        n_candidates=top_k if candidates is None else candidates,
        n_tokens=trace.n_tokens,
        n_texts=len(trace.sequence_starts),
    )


def plot_predictability(info: PredictabilityInfo) -> go.Figure:
    """Draw recall as a heatmap, one row per predictor with its mean, the best on top."""
    n_rows, n_layers = info.recall.shape
    labels = [
        f"{name}  {mean:.2f}" for name, mean in zip(info.names, info.mean_recall, strict=True)
    ]
    kept = "what the gating would keep" if info.n_candidates is None else info.n_candidates
    cells = go.Heatmap(
        z=info.recall,
        y=labels,
        zmin=0,
        zmax=1,
        colorscale=theme.SEQUENTIAL,
        customdata=np.stack([theme.error_texts(info.recall_se, ".3f"), info.precision], axis=2),
        hoverongaps=False,
        hovertemplate="%{y}<br>layer %{x}<br>recall <b>%{z:.3f}</b> %{customdata[0]}<br>"
        "precision %{customdata[1]:.3f}<extra></extra>",
        colorbar=theme.colour_bar("share of needed experts predicted", tickformat=".0%"),
    )
    return theme.draw(
        [cells],
        title="Which experts a layer will need, predicted",
        subtitle=f"recall by layer, and its mean beside each name; candidates: {kept}; "
        f"{info.n_tokens:,} tokens of {info.n_texts} texts",
        height=theme.heatmap_height(n_rows),
        xaxis=theme.layer_axis(n_layers),
        yaxis={"title": {"text": "predictor"}, "autorange": "reversed", "showgrid": False},
    )


def _named(predictor: str, distance: int) -> str:
    """Return what a predictor at a distance is called; at 0 it knows before the forward pass."""
    name = MEANINGS.get(predictor, predictor)
    return f"{name}, {distance} ahead" if distance else name
