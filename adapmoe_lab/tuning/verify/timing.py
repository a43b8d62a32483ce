"""How fast a model decodes, and how far that is from what is predicted of this machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.records import (
    HardwareProfile,
    LatencyReport,
    Measurement,
    RoutingTrace,
    TunedConfig,
)
from adapmoe_lab.records.verify_report import Check, Verdict
from adapmoe_lab.simulation.simulate import replayed_and_timed

SPEED, PREDICTION = "speed", "prediction"

MOST_ERROR = 0.10
"""Largest error of a predicted time per output token that the project aims at."""


def check_speed(report: LatencyReport) -> Check:
    """Return the measured times; nothing bounds them."""
    return Check(
        SPEED,
        "measured",
        f"prefill {_in_words(report.prefill)} per prompt; "
        f"decode {_in_words(report.decode)} per token",
        values={
            "prefill": _summary(report.prefill),
            "decode": _summary(report.decode),
            "latency": report.to_json(),
        },
    )


def check_prediction(
    trace: RoutingTrace,
    config: TunedConfig,
    rounds: Sequence[LatencyReport],
    probes: Sequence[HardwareProfile],
) -> Check:
    """Compare the time per output token that is predicted with the one that was measured.

    Both are medians over prompts of the mean over a prompt's output tokens. Predicted for a round
    is the mean of what follows from the probes before and after it, so that what else the machine
    does falls on both. The error is the median over rounds; where rounds differ among each other
    by more than the bound, or there is only one, it is not known to be the prediction's.

    Args:
        trace: the routing of the same prompts, recorded with nothing skipped.
        config: what was measured, with its slots.
        rounds: the measurements.
        probes: what the parts of a step cost here, before the first round and after each.
    """
    by_probe = np.array([np.median(predicted_s(trace, config, probe)) for probe in probes])
    predicted = (by_probe[1:] + by_probe[:-1]) / 2
    measured = np.array([report.decode.median for report in rounds])
    values = {
        "predicted_ms_per_token": (1e3 * predicted).tolist(),
        "measured_ms_per_token": (1e3 * measured).tolist(),
        "bound": MOST_ERROR,
        "probes": [probe.to_json() for probe in probes],
    }
    if not min(predicted.min(), measured.min()) > 0:
        return Check(PREDICTION, "not known", "decoding took no time", values=values)
    ratios = predicted / measured
    error = float(np.median(ratios)) - 1
    spread = float(ratios.max() / ratios.min()) - 1 if len(ratios) > 1 else None
    verdict: Verdict = "not known"
    if spread is not None and spread <= MOST_ERROR:
        verdict = "passed" if abs(error) <= MOST_ERROR else "failed"
    differ = f"rounds differ by {spread:.1%}" if spread is not None else "in one round"
    found = (
        f"{1e3 * np.median(predicted):.3g} ms per token predicted, "
        f"{1e3 * np.median(measured):.3g} measured, {error:+.1%}; {differ}"
    )
    values |= {"error": error, "spread": spread}
    return Check(
        PREDICTION, verdict, found, f"{MOST_ERROR:.0%}, if rounds differ by no more", values
    )


def predicted_s(
    trace: RoutingTrace, config: TunedConfig, hardware: HardwareProfile
) -> NDArray[np.float64]:
    """Return the predicted mean seconds per output token of every prompt [S] of a recorded decode.

    As in a measurement the first prompt is run once before, to warm up.
    """
    n_sequences = len(trace.sequence_starts)
    run = trace.of_sequences([0, *range(n_sequences)])
    replayed, timeline = replayed_and_timed(run, config, kept_experts(run, config.gating), hardware)
    assert timeline is not None, "hardware was given"  # noqa: S101
    starts = run.step_ids[run.sequence_starts[1:]]  # of those that count
    steps = zip(
        *(np.split(each, starts)[1:] for each in (timeline.step_s, replayed.is_decode)), strict=True
    )
    return np.array([seconds[is_decode].mean() for seconds, is_decode in steps])


def _summary(measured: Measurement) -> dict[str, float]:
    """Return median and tenth and ninetieth percentile, in milliseconds."""
    low, median, high = 1e3 * np.percentile(measured.samples, [10, 50, 90])
    return {"median_ms": float(median), "p10_ms": float(low), "p90_ms": float(high)}


def _in_words(measured: Measurement) -> str:
    values = _summary(measured)
    return f"{values['median_ms']:.3g} ms ({values['p10_ms']:.3g} to {values['p90_ms']:.3g})"
