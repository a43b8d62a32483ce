"""The what-if: experts per token, hits, time and loss of a config, before it is run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.gating import kept_experts
from adapmoe_lab.records import (
    HardwareProfile,
    RoutingTrace,
    SensitivityProfile,
    TunedConfig,
)
from adapmoe_lab.simulation.cost import layer_step_s
from adapmoe_lab.simulation.replay import replay


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a config is predicted to do, decode steps only, batch 1.

    Attributes:
        experts_per_token: float64 [L], experts run per token.
        skipped_fraction: skipped expert activations over all the router chose.
        hit_rate: float64 [L], share of needed experts that are resident.
        loads_per_token: float64 [L], experts loaded per token.
        bytes_per_token: bytes that cross the link per token.
        ms_per_token: predicted mean milliseconds per output token; None without hardware.
        loss_increase_nats: predicted loss increase per token; None without a sensitivity.
        loss_increase_se: its standard error.
    """

    experts_per_token: NDArray[np.float64]
    skipped_fraction: float
    hit_rate: NDArray[np.float64]
    loads_per_token: NDArray[np.float64]
    bytes_per_token: float
    ms_per_token: float | None = None
    loss_increase_nats: float | None = None
    loss_increase_se: float | None = None

    @property
    def mean_experts_per_token(self) -> float:
        """Experts run per token and layer, averaged over layers."""
        return float(self.experts_per_token.mean())

    @property
    def mean_hit_rate(self) -> float:
        """Hit rate over all layers, weighted by what each asks for."""
        needed = self.experts_per_token.sum()
        return float(1 - self.loads_per_token.sum() / needed) if needed else 1.0


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
        ValueError: the sensitivity was measured with something else in place of skipped experts.
    """
    steps = trace.as_decode()
    keep = kept_experts(steps, config.gating)
    replayed = replay(steps, keep, config.plan, config.eviction)
    counted = slice(min(warmup_tokens, trace.n_tokens // 2), None)
    hits, misses = replayed.hits[counted], replayed.misses[counted]
    slot_bytes = config.plan.slot_bytes if config.plan is not None else None
    if slot_bytes is None:
        slot_bytes = np.full(trace.spec.n_layers, trace.spec.stored_expert_bytes)
    loss, loss_se = _predicted_loss(config, keep, sensitivity)
    ms_per_token = None
    if hardware is not None:
        load_s = np.array([hardware.load_s(n) for n in slot_bytes])
        loads, streamed = replayed.loads[counted], replayed.streamed[counted]
        busy_s = layer_step_s(hits, loads, streamed, load_s, hardware.expert_s).sum(axis=1)
        ms_per_token = 1e3 * float(hardware.dense_step_s + busy_s.mean())
    return Simulation(
        experts_per_token=keep[counted].sum(axis=2).mean(axis=0),
        skipped_fraction=float(1 - keep.mean()),
        hit_rate=hits.sum(axis=0) / np.maximum(1, (hits + misses).sum(axis=0)),
        loads_per_token=misses.mean(axis=0),
        bytes_per_token=float((misses.mean(axis=0) * slot_bytes).sum()),
        ms_per_token=ms_per_token,
        loss_increase_nats=loss,
        loss_increase_se=loss_se,
    )


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
