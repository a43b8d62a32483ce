"""What prefetching saves, by the cache and by how fast the link is beside computing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.colors import sample_colorscale

from adapmoe_lab.policies.allocation.slots import uniform_plan
from adapmoe_lab.records import (
    HardwareProfile,
    MoESpec,
    Prediction,
    Predictors,
    RoutingTrace,
    TunedConfig,
)
from adapmoe_lab.records.prefetch import buffer_bytes
from adapmoe_lab.simulation.search.prefetch_search import (
    NO_SOURCES,
    buffer_slots,
    ms_per_token,
    prefetch_choices,
)
from adapmoe_lab.simulation.simulate import simulate
from adapmoe_lab.views.figures import theme

PERFECT = "were every prediction right"
WARM_IS_SLOW = [
    [0.0, theme.ORANGE], [0.33, theme.PAIRED[1]], [0.67, theme.PAIRED[3]], [1.0, theme.BLUE],
]  # fmt: skip
"""Colours of links, the slowest first."""
CHOICES = (theme.PAIRED[3], theme.BLUE, theme.PAIRED[1], theme.ORANGE)
"""Colours of ever more predictors that are followed."""
DOTTED = {"width": 1.2, "dash": "dot"}


@dataclass(frozen=True, eq=False)
class PrefetchGainInfo:
    """Predicted times over R link speeds and S cache sizes, the buffer out of the same memory.

    Attributes:
        ratios: float64 [R], time to load an expert over that of a layer with every expert there.
        shares: float64 [S], memory over that of all experts.
        ms: by prefetch sources, float64 [R, S], predicted milliseconds per token; NaN where there
            is no room for a buffer.
        best: [R][S], the best sources.
        perfect_ms: float64 [R, S], with all sources followed, were every candidate right.
        idle: float64 [R, S], share of the time that the link idles without prefetching.
        idle_after: float64 [R, S], with the best.
        n_tokens: tokens replayed.
    """

    ratios: NDArray[np.float64]
    shares: NDArray[np.float64]
    ms: dict[str, NDArray[np.float64]]
    best: tuple[tuple[str, ...], ...]
    perfect_ms: NDArray[np.float64]
    idle: NDArray[np.float64]
    idle_after: NDArray[np.float64]
    n_tokens: int

    @property
    def saved(self) -> NDArray[np.float64]:
        """Share of the time that following the best saves, float64 [R, S]."""
        return 1 - np.fmin.reduce(list(self.ms.values())) / self.ms[NO_SOURCES]

    @property
    def saved_if_perfect(self) -> NDArray[np.float64]:
        """Share of the time that would be saved were all candidates right, float64 [R, S]."""
        return 1 - self.perfect_ms / self.ms[NO_SOURCES]


def prefetch_gain_info(
    trace: RoutingTrace,
    hardware: HardwareProfile,
    ratios: Sequence[float],
    shares: Sequence[float] = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875),
    *,
    eviction: str = "lru",
    fitted: Predictors | None = None,
) -> PrefetchGainInfo:
    """Predict the time of a token with the best prefetch sources, for faster and slower links.

    Slots are divided evenly. A buffer, and what is fitted, come out of the same memory.

    Args:
        trace: recorded routing, with predictions.
        hardware: measured times; its link is replaced, see `HardwareProfile.at_load_ratio`.
        ratios: times to load an expert over that of a layer with every expert there.
        shares: memory over that of all experts.
        eviction: who leaves the slots.
        fitted: fitted predictors whose predictions the trace has.
    """
    spec, all_right = trace.spec, _all_right(trace)
    plain = replace(TunedConfig.untuned(spec), eviction=eviction)
    links = [hardware.at_load_ratio(spec, ratio) for ratio in ratios]
    shape = len(ratios), len(shares)
    ms: dict[str, NDArray[np.float64]] = {}
    idle = np.full((2, *shape), np.nan)
    best = [[NO_SOURCES] * len(shares) for _ in ratios]
    for s, share in enumerate(shares):
        without, beside = _configs(plain, spec, share, fitted)
        tables = _tables(trace, beside, fitted)
        predicted = _tables(all_right, beside, fitted)
        for r, link in enumerate(links):
            found = {NO_SOURCES: simulate(trace, without, link)}
            found |= {n: simulate(trace, config, link) for n, config in tables.items()}
            times = {name: ms_per_token(simulation) for name, simulation in found.items()}
            best[r][s] = min(times, key=lambda name: times[name])
            idle[:, r, s] = [found[n].link_idle_share for n in (NO_SOURCES, best[r][s])]
            right = [ms_per_token(simulate(all_right, c, link)) for c in predicted.values()]
            times[PERFECT] = min(right + list(times.values())) if right else np.nan
            for name, time in times.items():
                ms.setdefault(name, np.full(shape, np.nan))[r, s] = time
    perfect_ms = ms.pop(PERFECT)
    return PrefetchGainInfo(
        ratios=np.array(ratios, dtype=np.float64),
        shares=np.array(shares, dtype=np.float64),
        ms=ms,
        best=tuple(map(tuple, best)),
        perfect_ms=perfect_ms,
        idle=idle[0],
        idle_after=idle[1],
        n_tokens=trace.n_tokens,
    )


def _configs(
    plain: TunedConfig, spec: MoESpec, share: float, fitted: Predictors | None
) -> tuple[TunedConfig, TunedConfig | None]:
    """Return a config with all memory in slots, and one that leaves room for a buffer, if any."""
    budget = round(share * spec.all_experts_bytes)
    without = replace(plain, plan=uniform_plan(spec, budget))
    n_bytes = buffer_bytes(buffer_slots(spec), spec.stored_expert_bytes, fitted)
    try:
        beside = uniform_plan(spec, budget, beside_bytes=n_bytes)
    except ValueError:  # no room for a buffer
        return without, None
    return without, replace(plain, plan=beside)


def _tables(
    trace: RoutingTrace, beside: TunedConfig | None, fitted: Predictors | None
) -> dict[str, TunedConfig]:
    """Return configs that prefetch, by their sources; none where there is no room."""
    tables = prefetch_choices(trace, beside, fitted) if beside is not None else {}
    return {name: replace(beside, prefetch=table) for name, table in tables.items() if table}


def _all_right(trace: RoutingTrace) -> RoutingTrace:
    """Return the trace with every prediction replaced by what was needed."""
    weights = trace.weights.astype(np.float16)
    return replace(
        trace,
        predictions={
            name: {distance: _right(trace, weights, given) for distance, given in by.items()}
            for name, by in trace.predictions.items()
        },
    )


def _right(trace: RoutingTrace, weights: NDArray[np.float16], given: Prediction) -> Prediction:
    is_asked = given.experts[:, :, :1] >= 0
    experts = np.where(is_asked, trace.expert_indices, -1)
    return Prediction(experts.astype(np.int16), np.where(is_asked, weights, 0))


def plot_prefetch_gain(info: PrefetchGainInfo) -> go.Figure:
    """Draw what is saved over the cached share, a line per link, and beside it the idle link."""
    left, right = theme.side_by_side(0.12)
    x = {
        "title": {"text": "memory, of all experts"},
        "tickformat": ".1~%",
        "tickvals": info.shares,
    }
    y = {"tickformat": ".0%", "rangemode": "tozero"}
    return theme.draw(
        [line for r in range(len(info.ratios)) for line in _lines(info, r)],
        title="What prefetching saves",
        subtitle="a line per link: loading an expert takes so many times as long as a layer; "
        f"{info.n_tokens:,} tokens",
        height=400,
        margin={"t": 124},
        legend=theme.KEY_ROW,
        annotations=[
            theme.panel_title(left, "time saved per token; dotted: were every prediction right"),
            theme.panel_title(right, "time the link idles; dotted: on demand only"),
        ],
        xaxis={**x, "domain": left},
        yaxis={**y, "title": {"text": "saved"}},
        xaxis2={**x, "domain": right, "anchor": "y2"},
        yaxis2={**y, "anchor": "x2", "title": {"text": "idle"}, "range": [0, 1.02]},
    )


def _lines(info: PrefetchGainInfo, r: int) -> list[go.Scatter]:
    colour = sample_colorscale(WARM_IS_SLOW, [r / max(1, len(info.ratios) - 1)])[0]
    details = np.stack([info.best[r], info.ms[NO_SOURCES][r]], axis=1, dtype=object)
    looks = {"x": info.shares, "legendgroup": str(r), "showlegend": False}
    dotted = {"mode": "lines", "line": {**DOTTED, "color": colour}, **looks}
    solid = {"mode": "lines+markers", "line": {"width": 2, "color": colour}, **looks}
    beside = {"xaxis": "x2", "yaxis": "y2"}
    name = f"{info.ratios[r]:g} × a layer"
    return [
        go.Scatter(
            y=info.saved_if_perfect[r],
            hovertemplate=f"{name}<br>%{{y:.0%}} were every prediction right<extra></extra>",
            **dotted,
        ),
        go.Scatter(
            **{**solid, "showlegend": True},
            y=info.saved[r],
            name=name,
            customdata=details,
            hovertemplate=f"{name}, %{{x:.1%}} of memory<br><b>%{{y:.1%}} saved</b> of "
            "%{customdata[1]:.1f} ms<br>followed: %{customdata[0]}<extra></extra>",
        ),
        go.Scatter(
            y=info.idle[r],
            hovertemplate=f"{name}<br>%{{y:.0%}} idle on demand<extra></extra>",
            **dotted,
            **beside,
        ),
        go.Scatter(
            y=info.idle_after[r],
            hovertemplate=f"{name}<br><b>%{{y:.0%}}</b> idle, prefetching<extra></extra>",
            **solid,
            **beside,
        ),
    ]


def plot_prefetch_choices(info: PrefetchGainInfo, ratio: float) -> go.Figure:
    """Draw the time per token by who is followed, over one of the links.

    Raises:
        ValueError: no link of that ratio was tried.
    """
    if ratio not in info.ratios:
        known = ", ".join(f"{known:g}" for known in info.ratios)
        raise ValueError(f"No link of ratio {ratio:g} was tried; there are {known}.")
    r = int(np.flatnonzero(info.ratios == ratio)[0])
    rows = {name: row[r] for name, row in info.ms.items()} | {PERFECT: info.perfect_ms[r]}
    dashes = {NO_SOURCES: "dash", PERFECT: "dot"}
    colours = [theme.INK, *CHOICES[: len(rows) - 2], theme.GREEN]
    lines = [
        go.Scatter(
            x=info.shares,
            y=row / rows[NO_SOURCES],
            customdata=row,
            name=name,
            mode="lines" if name in dashes else "lines+markers",
            line={"color": colour, "width": 2, "dash": dashes.get(name)},
            hovertemplate="%{x:.1%} of memory<br><b>%{customdata:.1f} ms</b> per token, %{y:.1%}",
        )
        for (name, row), colour in zip(rows.items(), colours, strict=True)
    ]
    return theme.draw(
        lines,
        title="Which predictors to follow",
        subtitle=f"predicted time per token, in the same memory; loading an expert takes {ratio:g} "
        f"× a layer; {info.n_tokens:,} tokens",
        height=380,
        margin={"t": 104},
        legend=theme.KEY_ROW,
        xaxis={
            "title": {"text": "memory, of all experts"},
            "tickformat": ".1~%",
            "tickvals": info.shares,
        },
        yaxis={"title": {"text": "time, on demand = 100%"}, "tickformat": ".0%"},
    )
