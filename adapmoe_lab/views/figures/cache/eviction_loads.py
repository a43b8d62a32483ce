"""What each eviction policy loads, between LRU and what no policy can beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.policies.allocation.slots import shared, slots_plan
from adapmoe_lab.records import GatingTable, RoutingTrace
from adapmoe_lab.simulation.search.cache_search import cache_choices, gap_closed
from adapmoe_lab.views.figures import theme

BASELINE, BOUND = "lru", "belady"
LOOKS = {
    "lru": ("LRU", theme.INK),
    "lfu": ("LFU", theme.PAIRED[1]),
    "lfu_aged": ("LFU, aged", theme.ORANGE),
    "least_stale": ("least stale", theme.PAIRED[3]),
    "router_average": ("router average", theme.BLUE),
    "hobbit": ("HOBBIT", theme.GREEN),
    "belady": ("Belady, knows the future", theme.FAINT),
}
"""Name and colour of every policy that is compared; pinned experts are another plan."""
POOLS = ("slots of its own for every layer", "one pool for all layers")


@dataclass(frozen=True, eq=False)
class EvictionLoadsInfo:
    """Loads of P policies over S cache sizes, in two kinds of pools.

    Attributes:
        policies: names of the policies, without the baseline's and the bound's.
        sizes: int64 [S], slots per layer; a pool for all has as many times the layers.
        loads: float64 [2, P, S], loads per token with slots per layer and in one pool.
        lru: float64 [2, S].
        belady: float64 [2, S], the bound.
        n_experts: E, experts per layer.
        n_tokens: tokens that were counted.
    """

    policies: tuple[str, ...]
    sizes: NDArray[np.int64]
    loads: NDArray[np.float64]
    lru: NDArray[np.float64]
    belady: NDArray[np.float64]
    n_experts: int
    n_tokens: int

    def gap_closed(self, slots: int) -> dict[str, tuple[float, float]]:
        """Return by policy what share of the gap between per-layer LRU and Belady it closes.

        With as many slots per layer, and as many in one pool; each against its own Belady.

        Raises:
            ValueError: no such size was replayed.
        """
        if slots not in self.sizes:
            known = ", ".join(map(str, self.sizes))
            raise ValueError(f"{slots} slots per layer were not replayed; there are {known}.")
        at = int(np.flatnonzero(self.sizes == slots)[0])
        rows = {"lru": self.lru[:, at]}
        rows |= {name: self.loads[:, i, at] for i, name in enumerate(self.policies)}
        base, bound = self.lru[0, at], self.belady[:, at]
        return {
            name: (gap_closed(row[0], base, bound[0]), gap_closed(row[1], base, bound[1]))
            for name, row in rows.items()
        }


def eviction_loads_info(
    trace: RoutingTrace,
    sizes: ArrayLike | None = None,
    policies: Sequence[str] | None = None,
    gating: GatingTable | None = None,
    *,
    first_counted: int = 0,
) -> EvictionLoadsInfo:
    """Replay a trace under every policy, at every size, in both kinds of pools.

    Args:
        trace: recorded routing; every token is a decode step of its own.
        sizes: slots per layer; at most eight sizes over all there are if None.
        policies: names of those to compare with LRU; all that need no pinned experts if None.
        gating: which of the routed experts are run.
        first_counted: tokens before this one only fill the cache.
    """
    spec = trace.spec
    if sizes is None:
        every = max(1, spec.n_experts // 8)
        sizes = np.arange(every, spec.n_experts, every)
    sizes = np.asarray(sizes, dtype=np.int64)
    if policies is None:
        policies = [name for name in LOOKS if name not in (BASELINE, BOUND)]
    names = [*policies, BASELINE, BOUND]
    plans = [slots_plan(spec, int(size)) for size in sizes]
    both = {(0, s): plan for s, plan in enumerate(plans)}
    both |= {(1, s): shared(plan) for s, plan in enumerate(plans)}
    loads = np.empty((2, len(names), len(sizes)))
    for (pool, size), plan in both.items():
        found = cache_choices(trace, {"": plan}, names, gating, first_counted=first_counted)
        loads[pool, :, size] = [choice.loads_per_token for choice in found]
    return EvictionLoadsInfo(
        policies=tuple(policies),
        sizes=sizes,
        loads=loads[:, :-2],
        lru=loads[:, -2],
        belady=loads[:, -1],
        n_experts=spec.n_experts,
        n_tokens=trace.n_tokens - first_counted,
    )


def plot_eviction_loads(info: EvictionLoadsInfo) -> go.Figure:
    """Draw loads over those of per-layer LRU against the cache size; grey cannot be reached."""
    left, right = theme.side_by_side(0.08)
    lowest = float((info.belady / info.lru[0]).min())
    y = {"tickformat": ".0%", "range": [max(0.0, lowest - 0.04), _top(info)]}
    x = {
        "title": {"text": "slots per layer"},
        "tickvals": info.sizes,
        "range": [info.sizes[0] - 0.2, info.sizes[-1] + 0.2],
    }
    return theme.draw(
        [trace for pool in (0, 1) for trace in _lines(info, pool)],
        title="What each eviction loads",
        subtitle=f"Loads per token, over LRU with slots of its own for every layer; "
        f"{info.n_tokens:,} tokens; grey: what no policy reaches",
        height=420,
        margin={"t": 124},
        legend=theme.KEY_ROW,
        annotations=[
            theme.panel_title(domain, text)
            for domain, text in zip((left, right), POOLS, strict=True)
        ],
        xaxis={**x, "domain": left},
        yaxis={**y, "title": {"text": "loads, LRU per layer = 100%"}},
        xaxis2={**x, "domain": right, "anchor": "y2"},
        yaxis2={**y, "anchor": "x2", "showticklabels": False},
    )


def _top(info: EvictionLoadsInfo) -> float:
    """Return the upper end of the axis: above all that is drawn, but no more than half over LRU."""
    drawn = np.concatenate([info.loads, info.lru[:, None]], axis=1) / info.lru[0]
    return min(1.5, float(drawn.max())) + 0.03


def _lines(info: EvictionLoadsInfo, pool: int) -> list[go.Scatter]:
    panel = "" if pool == 0 else "2"
    rows = {BASELINE: info.lru[pool]}
    rows |= {name: info.loads[pool, i] for i, name in enumerate(info.policies)}
    bound = go.Scatter(
        x=info.sizes,
        y=info.belady[pool] / info.lru[0],
        customdata=info.belady[pool],
        mode="lines",
        fill="tozeroy",
        fillcolor=theme.CHANCE_BAND,
        line={"color": theme.INK, "width": 1},
        name=LOOKS[BOUND][0],
        showlegend=pool == 0,
        xaxis=f"x{panel}",
        yaxis=f"y{panel}",
        hovertemplate="%{x} slots per layer<br><b>%{customdata:.2f}</b> loads per token, %{y:.0%}",
    )
    lines = [
        go.Scatter(
            x=info.sizes,
            y=row / info.lru[0],
            customdata=row,
            mode="lines+markers" if name != BASELINE else "lines",
            name=LOOKS[name][0],
            showlegend=pool == 0,
            line={
                "color": LOOKS[name][1],
                "width": 2,
                "dash": "dash" if name == BASELINE else None,
            },
            marker={"size": 6},
            xaxis=f"x{panel}",
            yaxis=f"y{panel}",
            hovertemplate="%{x} slots per layer<br><b>%{customdata:.2f}</b> loads per token, "
            "%{y:.0%}",
        )
        for name, row in rows.items()
    ]
    return [bound, *lines]


def plot_gap_closed(info: EvictionLoadsInfo, slots: int) -> go.Figure:
    """Draw how far each policy comes from per-layer LRU towards Belady, with `slots` per layer."""
    gaps = info.gap_closed(slots)
    names = [LOOKS[name][0] for name in gaps]
    return theme.draw(
        [
            go.Bar(
                x=[gap[pool] for gap in gaps.values()],
                y=names,
                orientation="h",
                name=POOLS[pool],
                marker={"color": colour},
                hovertemplate="%{y}<br><b>%{x:.0%}</b> of the gap closed",
            )
            for pool, colour in ((0, theme.BLUE), (1, theme.ORANGE))
        ],
        title="How much of the way to Belady",
        subtitle=f"0: LRU per layer; 100%: as if the future were known; {slots} of "
        f"{info.n_experts} experts of a layer have a slot",
        height=150 + 40 * len(names),
        margin={"t": 92},
        legend={**theme.KEY_ROW, "y": 0.84},
        bargap=0.3,
        xaxis={
            "title": {"text": "share of the gap closed"},
            "tickformat": ".0%",
            "showgrid": True,
            "zeroline": True,
            "zerolinecolor": theme.FAINT,
        },
        yaxis={"autorange": "reversed", "showgrid": False},
    )
