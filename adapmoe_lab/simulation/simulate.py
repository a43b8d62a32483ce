"""The what-if: experts per token, hits, time and loss of a config, before it is run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.records import (
    HardwareProfile,
    PrecisionPlan,
    RoutingTrace,
    SensitivityProfile,
    TunedConfig,
)
from adapmoe_lab.simulation.replay.outcomes import HIT
from adapmoe_lab.simulation.replay.recorded_candidates import recorded_candidates
from adapmoe_lab.simulation.replay.replay import Replay, replay
from adapmoe_lab.simulation.timing.timeline import Timeline, run_timeline


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a config is predicted to do, decode steps only, batch 1.

    Attributes:
        experts_per_token: float64 [L], experts run per token.
        skipped_fraction: skipped expert activations over all the router chose.
        hit_rate: float64 [L], share of needed experts that are resident.
        loads_per_token: float64 [L], experts that must be demanded per token.
        bytes_per_token: bytes that cross the link per token.
        prefetch_used_per_token: float64 [L], prefetches begun whose experts are needed.
        prefetch_wasted_per_token: float64 [L], prefetches begun whose experts are not.
        stall_ms_per_token: float64 [L], milliseconds that computing waits for the link; None
            without hardware.
        link_idle_share: share of the time in which nothing crosses the link; None without
            hardware.
        ms_per_token: predicted mean milliseconds per output token; None without hardware.
        loss_increase_nats: predicted loss increase per token; None without a sensitivity.
        loss_increase_se: its standard error; None if not known, as from a single text.
    """

    experts_per_token: NDArray[np.float64]
    skipped_fraction: float
    hit_rate: NDArray[np.float64]
    loads_per_token: NDArray[np.float64]
    bytes_per_token: float
    prefetch_used_per_token: NDArray[np.float64]
    prefetch_wasted_per_token: NDArray[np.float64]
    stall_ms_per_token: NDArray[np.float64] | None = None
    link_idle_share: float | None = None
    ms_per_token: float | None = None
    loss_increase_nats: float | None = None
    loss_increase_se: float | None = None

    @property
    def mean_experts_per_token(self) -> float:
        """Experts run per token and layer, averaged over layers."""
        return float(self.experts_per_token.mean())

    @property
    def mean_hit_rate(self) -> float:
        """Hit rate over all layers, weighted by the experts that each needs."""
        needed = self.experts_per_token.sum()
        missed = self.loads_per_token.sum() + self.prefetch_used_per_token.sum()
        return float(1 - missed / needed) if needed else 1.0


def simulate(
    trace: RoutingTrace,
    config: TunedConfig,
    hardware: HardwareProfile | None = None,
    *,
    sensitivity: SensitivityProfile | None = None,
    warmup_tokens: int = 32,
) -> Simulation:
    """Predict what a config does on a recorded trace, token by token.

    Args:
        trace: recorded routing; every token is replayed as a decode step of its own.
        config: gating, cache plan and eviction to replay.
        hardware: measured times; without it no latency is predicted.
        sensitivity: what skipping costs; without it no loss is predicted.
        warmup_tokens: tokens replayed to fill the cache and not counted.

    Raises:
        RecordError: config or sensitivity are of another model than the trace.
        ValueError: the sensitivity was measured with something else in place of skipped experts.
    """
    config.check_model(trace.spec)
    if sensitivity is not None:
        sensitivity.check_model(trace.spec)
    keep = kept_experts(trace, config.gating)
    counted = slice(min(warmup_tokens, trace.n_tokens // 2), None)
    replayed, timeline = replayed_and_timed(trace.as_decode(), config, keep, hardware)
    hits, misses = replayed.hits[counted], replayed.misses[counted]
    loss, loss_se = _predicted_loss(config, keep, sensitivity)
    used = wasted = np.zeros(trace.spec.n_layers)
    stall_ms = idle = ms_per_token = None
    sizes = trace.spec.sizes_in(config.precision)
    bytes_per_token = float(bytes_missed(replayed, sizes)[counted].mean())
    if timeline is not None:
        step_s = timeline.step_s[counted]
        used, wasted = timeline.used[counted].mean(axis=0), timeline.wasted[counted].mean(axis=0)
        stall_ms = 1e3 * timeline.stall_s[counted].mean(axis=0)
        idle = 1 - float(timeline.link_s[counted].sum() / step_s.sum())
        ms_per_token = 1e3 * float(step_s.mean())
        bytes_per_token = float(timeline.n_bytes[counted].mean())
    return Simulation(
        experts_per_token=keep[counted].sum(axis=2).mean(axis=0),
        skipped_fraction=float(1 - keep.mean()),
        hit_rate=hits.sum(axis=0) / np.maximum(1, (hits + misses).sum(axis=0)),
        loads_per_token=misses.mean(axis=0) - used,
        bytes_per_token=bytes_per_token,
        prefetch_used_per_token=used,
        prefetch_wasted_per_token=wasted,
        stall_ms_per_token=stall_ms,
        link_idle_share=idle,
        ms_per_token=ms_per_token,
        loss_increase_nats=loss,
        loss_increase_se=loss_se,
    )


def replayed_and_timed(
    trace: RoutingTrace,
    config: TunedConfig,
    keep: NDArray[np.bool_],
    hardware: HardwareProfile | None,
    n_events: int = 0,
) -> tuple[Replay, Timeline | None]:
    """Replay a trace under a config in the steps it was recorded in, timed if times are known.

    Args:
        trace: recorded routing.
        config: cache plan, eviction and prefetch; its gating here only leaves out candidates.
        keep: bool [T, L, K], which of the routed experts are run.
        hardware: measured times; without it nothing is timed or prefetched.
        n_events: how many events of the timeline to keep.
    """
    spec = trace.spec
    table = config.prefetch if hardware is not None else None
    candidates = recorded_candidates(trace, table, config.gating)
    replayed = replay(trace, keep, config.plan, config.eviction, candidates)
    if hardware is None:
        return replayed, None
    costs = hardware.step_costs(spec.sizes_in(config.precision), config.gating is not None)
    room = table.buffer_slots if table is not None else 0
    return replayed, run_timeline(replayed, costs, candidates, room, n_events)


def bytes_missed(replayed: Replay, precision: PrecisionPlan) -> NDArray[np.int64]:
    """Return the bytes of all experts that each step lacked, int64 [N]."""
    sizes = precision.expert_bytes
    assert sizes is not None, "a spec knows its bytes"  # noqa: S101
    n_bytes = np.zeros(replayed.hits.shape[0], dtype=np.int64)
    for layer, starts in enumerate(replayed.starts):
        own = slice(starts[0], starts[-1])
        is_missing = replayed.outcomes[layer, own] != HIT
        crossed = np.append(0, np.cumsum(sizes[layer, replayed.members[layer, own]] * is_missing))
        n_bytes += np.diff(crossed[starts - starts[0]])
    return n_bytes


def _predicted_loss(
    config: TunedConfig, keep: NDArray[np.bool_], sensitivity: SensitivityProfile | None
) -> tuple[float | None, float | None]:
    if sensitivity is None:
        return None, None
    gating = config.gating
    if gating is None:
        return 0.0, 0.0
    if sensitivity.stand_in != config.stand_in:
        raise ValueError(
            f"The sensitivity was measured with {sensitivity.stand_in} in place of skipped "
            f"experts; the config puts {config.stand_in} there. Measure the sensitivity with the "
            "config's compensation and renormalisation."
        )
    if gating.is_one_cut_per_layer:
        return sensitivity.total_increase(gating.cuts[:, 0])
    return sensitivity.total_increase(sensitivity.cuts_skipping(1 - keep.mean(axis=(0, 2))))
