"""Which experts of a layer are used by the same tokens, more or less often than by chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.records import RoutingTrace
from adapmoe_lab.simulation.statistics.chance import binomial_band, pair_band
from adapmoe_lab.simulation.statistics.routing_patterns import co_activation, pairs_given_use
from adapmoe_lab.views.figures import theme
from adapmoe_lab.views.figures.routing.lift import bound_of, lift_cells


@dataclass(frozen=True, eq=False)
class CoActivationInfo:
    """Pairs of one layer's experts; every array is [E, E], symmetric, NaN on the diagonal.

    Attributes:
        layer: the layer.
        together: float64, tokens that use both experts.
        lift: float64, that over what a uniform router would give.
        outside: bool, pairs that a uniform router does not explain.
        lift_given_use: float64, `together` over what partners chosen by their use alone would
            give.
        outside_given_use: bool, pairs that use alone does not explain.
        n_tokens: tokens counted.
    """

    layer: int
    together: NDArray[np.float64]
    lift: NDArray[np.float64]
    outside: NDArray[np.bool_]
    lift_given_use: NDArray[np.float64]
    outside_given_use: NDArray[np.bool_]
    n_tokens: int


def co_activation_info(trace: RoutingTrace, layer: int) -> CoActivationInfo:
    """Count the pairs of one layer's experts and compare them with chance.

    Raises:
        ValueError: the router chooses one expert, so there are no pairs.
    """
    n_experts, top_k, n_tokens = trace.spec.n_experts, trace.spec.top_k, trace.n_tokens
    if top_k < 2:
        raise ValueError("A top-1 router uses no two experts for one token: there are no pairs.")
    counts = co_activation(trace.expert_indices[:, layer], n_experts)
    uniform, by_use = pair_band(n_tokens, n_experts, top_k), pairs_given_use(counts)
    apart = ~np.eye(n_experts, dtype=np.bool_)
    together = np.where(apart, counts, np.nan)
    unused = np.full(by_use.shape, np.nan)
    return CoActivationInfo(
        layer=layer,
        together=together,
        lift=together / uniform.mean,
        outside=uniform.outside(counts) & apart,
        lift_given_use=np.divide(together, by_use, out=unused, where=by_use > 0),
        outside_given_use=binomial_band(n_tokens, by_use / n_tokens).outside(counts) & apart,
        n_tokens=n_tokens,
    )


def plot_co_activation(info: CoActivationInfo) -> go.Figure:
    """Draw the pairs as a map against a uniform router, and beside it against use alone."""
    n_experts = len(info.together)
    left, right = theme.side_by_side(0.1)
    bound = bound_of(info.lift[info.outside], info.lift_given_use[info.outside_given_use])
    n_pairs = n_experts * (n_experts - 1) // 2
    axis = theme.numbered_axis("expert", n_experts, 8, showgrid=False)
    down = {**axis, "range": axis["range"][::-1]}
    texts = _texts(info)
    first = lift_cells(info.lift, info.outside, bound, text=texts)
    second = lift_cells(
        info.lift_given_use, info.outside_given_use, bound, text=texts, xaxis="x2", yaxis="y2"
    )
    return theme.draw(
        [first, second.update(showscale=False)],
        title=f"Experts used together, layer {info.layer}",
        subtitle=f"Of {n_pairs} pairs, {_n_pairs(info.outside)} differ from a uniform router and "
        f"{_n_pairs(info.outside_given_use)} from what use alone explains; the others are pale",
        height=480,
        margin={"t": 88},
        annotations=[
            theme.panel_title(left, "against a uniform router"),
            theme.panel_title(right, "given how often each is used"),
        ],
        xaxis={**axis, "domain": left},
        yaxis=down,
        xaxis2={**axis, "domain": right, "anchor": "y2"},
        yaxis2={**down, "anchor": "x2"},
    )


def _n_pairs(which: NDArray[np.bool_]) -> int:
    return int(np.triu(which, k=1).sum())


def _texts(info: CoActivationInfo) -> list[list[str]]:
    experts = range(len(info.together))
    return [
        [
            f"experts {a} and {b}<br><b>{info.together[a, b]:,.0f}</b> of {info.n_tokens:,} tokens"
            f"<br>×{info.lift[a, b]:.2f} of a uniform router"
            f"<br>×{info.lift_given_use[a, b]:.2f} given their use"
            if a != b
            else ""
            for b in experts
        ]
        for a in experts
    ]
