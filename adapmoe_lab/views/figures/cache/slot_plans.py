"""How the same slots are divided over layers, and what each division is expected to load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.records import CachePlan
from adapmoe_lab.views.figures import theme

COLOURS = (theme.FAINT, theme.BLUE, theme.ORANGE, theme.GREEN)


@dataclass(frozen=True, eq=False)
class SlotPlansInfo:
    """N plans of as many slots for one model, judged by one set of curves.

    Attributes:
        names: of the plans; the first is what the others are compared with.
        slots: int64 [N, L].
        loads: float64 [N, L], loads per token that the curves give each layer.
        n_experts: E, experts per layer.
        model: what the plans are for.
    """

    names: tuple[str, ...]
    slots: NDArray[np.int64]
    loads: NDArray[np.float64]
    n_experts: int
    model: str


def slot_plans_info(plans: Mapping[str, CachePlan], curves: ArrayLike, model: str) -> SlotPlansInfo:
    """Compare plans by name.

    Args:
        plans: with slots of their own for every layer; the first is what others are compared with.
        curves: float64 [L, E+1], loads per token of each layer with 0..E slots.
        model: what the plans are for, in words.

    Raises:
        ValueError: there is no plan, plans differ in layers or slots, or one has a single pool.
    """
    curves = np.asarray(curves, dtype=np.float64)
    n_layers, n_choices = curves.shape
    totals = {plan.n_slots for plan in plans.values()}
    if len(totals) != 1 or any(len(plan.slots) != n_layers for plan in plans.values()):
        raise ValueError(
            f"Plans are compared with as many slots, over the {n_layers} layers of the curves; got "
            + (", ".join(f"{n}: {p.n_slots}" for n, p in plans.items()) or "none")
            + "."
        )
    pools = [name for name, plan in plans.items() if plan.is_global]
    if pools:
        raise ValueError(f"The slots of {pools[0]!r} are shared; they belong to no layer.")
    slots = np.stack([plan.slots for plan in plans.values()])
    loads = curves[np.arange(n_layers), slots]
    return SlotPlansInfo(tuple(plans), slots, loads, n_choices - 1, model)


def plot_slot_plans(info: SlotPlansInfo) -> go.Figure:
    """Draw the slots of each layer as bars side by side, and beside them the loads of each plan."""
    n_layers = info.slots.shape[1]
    left, right = [0.0, 0.66], [0.76, 1.0]
    share = info.slots[0].sum() / (n_layers * info.n_experts)
    totals = info.loads.sum(axis=1)
    return theme.draw(
        [*_slots(info), *_totals(info)],
        title=f"Where the slots go, {info.model}",
        subtitle=f"{info.slots[0].sum()} slots for {n_layers * info.n_experts} experts "
        f"({share:.0%}), divided in {len(info.names)} ways",
        height=380,
        margin={"t": 106},
        legend=theme.KEY_ROW,
        bargap=0.25,
        bargroupgap=0.0,
        annotations=[
            theme.panel_title(left, "slots of each layer"),
            theme.panel_title(right, "loads per token, all layers"),
        ],
        xaxis=theme.layer_axis(n_layers, domain=left),
        yaxis={"title": {"text": "slots"}, "range": [0, 1.04 * max(1, info.slots.max())]},
        xaxis2={"domain": right, "anchor": "y2", "showticklabels": False},
        yaxis2={"anchor": "x2", "range": [0, 1.25 * max(totals.max(), 1e-9)], "visible": False},
    )


def _slots(info: SlotPlansInfo) -> list[go.Bar]:
    return [
        go.Bar(
            x=np.arange(info.slots.shape[1]),
            y=info.slots[i],
            customdata=info.loads[i],
            name=name,
            offsetgroup=name,
            marker={"color": COLOURS[i % len(COLOURS)]},
            hovertemplate="layer %{x}<br><b>%{y} slots</b>, %{customdata:.2f} loads per token",
        )
        for i, name in enumerate(info.names)
    ]


def _totals(info: SlotPlansInfo) -> list[go.Bar]:
    totals = info.loads.sum(axis=1)
    ratios = totals / totals[0] - 1 if totals[0] else np.zeros(len(totals))
    labels = [f"{totals[0]:.2f}"]
    labels += [f"{t:.2f}<br>{r:+.1%}" for t, r in zip(totals[1:], ratios[1:], strict=True)]
    return [
        go.Bar(
            x=[i],
            y=[totals[i]],
            text=[labels[i]],
            textposition="outside",
            cliponaxis=False,
            name=name,
            xaxis="x2",
            yaxis="y2",
            showlegend=False,
            width=0.7,
            marker={"color": COLOURS[i % len(COLOURS)]},
            hovertemplate="<b>%{y:.2f}</b> loads per token",
        )
        for i, name in enumerate(info.names)
    ]
