"""One decode step, event by event: what computes, what crosses the link, and who waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.records import HardwareProfile, RoutingTrace, TunedConfig
from adapmoe_lab.records.step_costs import N_CHUNKS
from adapmoe_lab.simulation.simulate import replayed_and_timed
from adapmoe_lab.simulation.timing.events import AHEAD, DENSE, EVENT_KINDS, EXPERT
from adapmoe_lab.simulation.timing.timeline import Timeline
from adapmoe_lab.views.figures import theme

KIND, LAYER, MEMBER, BEGIN, END = range(5)
"""Columns of a timeline's events."""

LOOKS = {
    "dense": ("attention, router", theme.FAINT, ""),
    "expert": ("expert", theme.BLUE, ""),
    "waiting": ("waiting", theme.ORANGE, "/"),
    "demand": ("on demand", theme.ORANGE, ""),
    "ahead": ("prefetched, needed", theme.GREEN, ""),
    "wasted": ("prefetched, not needed", theme.GREEN, "/"),
}
"""Name, colour and hatching of everything that is drawn; the first three compute, or would."""
COMPUTE = ("dense", "expert", "waiting")
ROWS = ((0.0, 1.0), (2.9, 3.9))
"""Where computing and the link are drawn, without and with prefetching."""


@dataclass(frozen=True, eq=False)
class StepEvents:
    """What happened when in one decode step, M events in the order they began.

    Attributes:
        kinds: of the events, see `LOOKS`.
        layers: int64 [M].
        experts: int64 [M], -1 for none.
        begin_ms: float64 [M], since the step began.
        end_ms: float64 [M].
        step_ms: milliseconds of the step.
    """

    kinds: tuple[str, ...]
    layers: NDArray[np.int64]
    experts: NDArray[np.int64]
    begin_ms: NDArray[np.float64]
    end_ms: NDArray[np.float64]
    step_ms: float

    def total_ms(self, kind: str) -> float:
        """Return the milliseconds that events of a kind take together."""
        is_meant = np.array([k == kind for k in self.kinds], dtype=np.bool_)
        return float((self.end_ms - self.begin_ms)[is_meant].sum())


@dataclass(frozen=True, eq=False)
class TimelineInfo:
    """One token twice: everything on demand, and with prefetching.

    Attributes:
        steps: without and with prefetching.
        token: its number in the trace.
        mean_ms: of all tokens, without and with.
    """

    steps: tuple[StepEvents, StepEvents]
    token: int
    mean_ms: tuple[float, float]


def timeline_info(
    trace: RoutingTrace, config: TunedConfig, hardware: HardwareProfile, token: int | None = None
) -> TimelineInfo:
    """Time one token of a trace under a config, without and with its prefetch.

    Args:
        trace: recorded routing, with the predictions that the config follows.
        config: the same slots hold the same experts with and without its prefetch.
        hardware: measured times.
        token: which; one whose times are nearest to the means if None.

    Raises:
        ValueError: the config prefetches nothing, or there is no such token.
    """
    if config.prefetch is None:
        raise ValueError(
            "The config prefetches nothing, so there is nothing to compare; give it a prefetch "
            "table, as lab.plan_prefetch returns."
        )
    both = (replace(config, prefetch=None), config)
    step_ms = np.stack([1e3 * _timed(trace, each, hardware).step_s for each in both])  # [2, T]
    mean_ms = step_ms.mean(axis=1)
    if token is None:
        token = int(np.abs(step_ms / mean_ms[:, None] - 1).sum(axis=0).argmin())
    if not 0 <= token < trace.n_tokens:
        raise ValueError(f"The trace has tokens 0..{trace.n_tokens - 1}; got {token}.")
    n_after = min(2, trace.n_tokens - token)
    until = trace.first(token + n_after)
    steps = [_step_events(_timed(until, each, hardware, is_logged=True), token) for each in both]
    return TimelineInfo((steps[0], steps[1]), token, (float(mean_ms[0]), float(mean_ms[1])))


def _timed(
    trace: RoutingTrace, config: TunedConfig, hardware: HardwareProfile, *, is_logged: bool = False
) -> Timeline:
    n_per_step = 1 + trace.spec.n_layers * (1 + 2 * trace.spec.top_k)
    if config.prefetch is not None:
        predicted = [source.probability.size for source in config.prefetch.sources]
        n_per_step += N_CHUNKS * sum(predicted)
    n_events = trace.n_tokens * n_per_step if is_logged else 0
    keep = kept_experts(trace, config.gating)
    _, timeline = replayed_and_timed(trace.as_decode(), config, keep, hardware, n_events)
    assert timeline is not None, "there is hardware"  # noqa: S101
    return timeline


def _step_events(timeline: Timeline, step: int) -> StepEvents:
    """Return the events of a step from those of all steps up to the one after it."""
    first, last = (timeline.ended_s[step - 1] if step else 0.0), timeline.ended_s[step]
    events = timeline.events
    own = events[(events[:, END] > first) & (events[:, BEGIN] < last)]
    own = own[own[:, END] > own[:, BEGIN]]
    computed = own[(own[:, KIND] == DENSE) | (own[:, KIND] == EXPERT)]
    named = [(EVENT_KINDS[int(event[KIND])], event) for event in own if event[KIND] != AHEAD]
    named += [("waiting", wait) for wait in _waits(computed, timeline.stall_s[step])]
    for chunk in _joined(own[own[:, KIND] == AHEAD]):
        is_needed = _is_needed(events, timeline.ended_s, chunk)
        named.append(("ahead" if is_needed else "wasted", chunk))
    named.sort(key=lambda pair: pair[1][BEGIN])
    rows = np.array([event for _, event in named])
    return StepEvents(
        kinds=tuple(kind for kind, _ in named),
        layers=rows[:, LAYER].astype(np.int64),
        experts=rows[:, MEMBER].astype(np.int64),
        begin_ms=1e3 * (np.maximum(rows[:, BEGIN], first) - first),
        end_ms=1e3 * (np.minimum(rows[:, END], last) - first),
        step_ms=1e3 * (last - first),
    )


def _waits(
    computed: NDArray[np.float64], stall_s: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """Return when computing waited for which expert, of a step's events that compute.

    What is left of the gap before a layer's first expert is the host's own work.

    Args:
        computed: float64 [M, 5], one after the other.
        stall_s: float64 [L], seconds that each layer waited.
    """
    left, waits = stall_s.copy(), []
    for before, event in zip(computed[-2::-1], computed[:0:-1], strict=True):
        layer = int(event[LAYER])
        waited = min(event[BEGIN] - before[END], left[layer]) if event[KIND] == EXPERT else 0.0
        if waited > 0:
            left[layer] -= waited
            waits.append(np.array([-1, layer, event[MEMBER], event[BEGIN] - waited, event[BEGIN]]))
    return waits


def _joined(chunks: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Return chunks of one expert that crossed the link one right after the other as one."""
    joined: list[NDArray[np.float64]] = []
    for chunk in chunks:
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last[LAYER : MEMBER + 1] == chunk[LAYER : MEMBER + 1]).all()
            and last[END] == chunk[BEGIN]
        ):
            last[END] = chunk[END]
        else:
            joined.append(chunk.copy())
    return joined


def _is_needed(
    events: NDArray[np.float64], ended_s: NDArray[np.float64], chunk: NDArray[np.float64]
) -> bool:
    """Return whether the next run of a chunk's layer ran the expert that it is of."""
    of_layer = (events[:, KIND] == EXPERT) & (events[:, LAYER] == chunk[LAYER])
    later = events[of_layer & (events[:, BEGIN] >= chunk[BEGIN])]
    if not len(later):
        return False
    step = np.searchsorted(ended_s, later[0, BEGIN], side="right")
    return bool((later[later[:, BEGIN] < ended_s[step], MEMBER] == chunk[MEMBER]).any())


def plot_timeline(info: TimelineInfo) -> go.Figure:
    """Draw computing and the link as two rows of bars, without and with prefetching."""
    without, ahead = info.steps
    bars = [
        _bars(step, kind, rows)
        for step, rows in zip(info.steps, ROWS, strict=True)
        for kind in LOOKS
    ]
    drawn = {kind for step in info.steps for kind in step.kinds}
    for bar in bars[len(LOOKS) :]:
        bar.showlegend = bar.legendgroup in drawn
    longest = max(without.step_ms, ahead.step_ms)
    return theme.draw(
        [*bars, *(_layer_numbers(*pair) for pair in zip(info.steps, ROWS, strict=True))],
        title="One token, on demand and with prefetching",
        subtitle=f"token {info.token}: {_change(without.step_ms, ahead.step_ms)}; "
        f"all tokens: {_change(*info.mean_ms)} on average",
        height=440,
        margin={"t": 104},
        legend={**theme.KEY_ROW, "y": 0.87},
        barmode="overlay",
        bargap=0,
        uniformtext={"minsize": 8, "mode": "hide"},
        annotations=[
            _heading(rows[0], f"<b>{text}</b>, {step.step_ms:.1f} ms")
            for text, step, rows in zip(
                ("everything on demand", "prefetching"), info.steps, ROWS, strict=True
            )
        ],
        xaxis={
            "title": {"text": "time (ms)"},
            "range": [-0.004 * longest, 1.01 * longest],
            "showgrid": True,
        },
        yaxis={
            "range": [ROWS[1][1] + 0.55, ROWS[0][0] - 1.3],
            "tickvals": [*ROWS[0], *ROWS[1]],
            "ticktext": ["compute", "link"] * 2,
            "showgrid": False,
        },
    )


def _change(before: float, after: float) -> str:
    return f"{before:.1f} → {after:.1f} ms ({after / before - 1:+.0%})"


def _bars(step: StepEvents, kind: str, rows: Sequence[float]) -> go.Bar:
    name, colour, hatching = LOOKS[kind]
    at = [place for place, is_of in enumerate(step.kinds) if is_of == kind]
    begin, end = step.begin_ms[at], step.end_ms[at]
    member = [f", expert {e}" if e >= 0 else "" for e in step.experts[at]]
    edge = {"width": 0 if kind in COMPUTE else 1, "color": "rgba(255, 255, 255, 0.6)"}
    looks = {"color": colour, "line": edge}
    if hatching:
        looks["pattern"] = {
            "shape": hatching,
            "fillmode": "replace",
            "fgcolor": colour,
            "size": 5,
            "solidity": 0.35,
        }
    return go.Bar(
        orientation="h",
        base=begin,
        x=end - begin,
        y=np.full(len(at), rows[0] if kind in COMPUTE else rows[1]),
        width=0.86,
        text=[str(e) for e in step.experts[at]] if kind in ("demand", "ahead") else None,
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        insidetextfont={"color": "#ffffff", "size": 10},
        customdata=np.stack([step.layers[at], begin, end, member], axis=1, dtype=object),
        name=name,
        legendgroup=kind,
        showlegend=False,
        marker=looks,
        hovertemplate=f"{name}<br>layer %{{customdata[0]}}%{{customdata[3]}}<br>"
        "<b>%{x:.2f} ms</b>, %{customdata[1]:.2f} to %{customdata[2]:.2f}<extra></extra>",
    )


def _layer_numbers(step: StepEvents, rows: Sequence[float]) -> go.Scatter:
    """Return the layers' numbers above where they begin, as many as there is room for."""
    begins = [
        (step.begin_ms[at], layer)
        for at, (kind, layer) in enumerate(zip(step.kinds, step.layers, strict=True))
        if kind == "dense"
    ]
    every = -(-len(begins) // 16)
    places, layers = zip(*begins[::every], strict=True)
    return go.Scatter(
        x=places,
        y=np.full(len(places), rows[0] - 0.62),
        mode="text",
        text=[f"layer {layer}" if at == 0 else str(layer) for at, layer in enumerate(layers)],
        textposition="middle right",
        textfont={"size": 10},
        hoverinfo="skip",
        showlegend=False,
    )


def _heading(row: float, text: str) -> dict[str, object]:
    return {
        "text": text,
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "y": row - 1.05,
        "yanchor": "middle",
        "showarrow": False,
    }
