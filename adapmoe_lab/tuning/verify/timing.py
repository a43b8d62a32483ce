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
    report: LatencyReport,
    probes: Sequence[HardwareProfile],
) -> Check:
    """Compare the time per output token that is predicted with the one that was measured.

    Both are medians over prompts of the mean over a prompt's output tokens; predicted is the mean
    of what follows from each probe. Where the machine itself drifted by more than the bound, or
    one round cannot tell whether it did, nothing is known of the prediction.

    Args:
        trace: the routing of the same prompts, recorded with nothing skipped.
        config: what was measured, with its slots.
        report: the measurement, its prompts again and again in one order.
        probes: what the parts of a step cost here, before the measurement and after it.
    """
    by_prompt = [predicted_s(trace, config, probe) for probe in probes]
    predicted_ms = (1e3 * np.median(by_prompt, axis=1)).tolist()
    by_round = report.decode.samples.reshape(-1, len(by_prompt[0]))
    measured_ms = (1e3 * np.median(by_round, axis=1)).tolist()
    predicted, measured = float(np.mean(predicted_ms)), 1e3 * report.decode.median
    values = {
        "predicted_ms_per_token": predicted,
        "predicted_ms_by_probe": predicted_ms,
        "measured_ms_per_token": measured,
        "measured_ms_by_round": measured_ms,
        "bound": MOST_ERROR,
        "probes": [probe.to_json() for probe in probes],
    }
    if not min(*predicted_ms, *measured_ms) > 0:
        return Check(PREDICTION, "not known", "decoding took no time", values=values)
    error, drift = predicted / measured - 1, _drift(predicted_ms, measured_ms)
    verdict: Verdict = "not known"
    if drift is not None and drift <= MOST_ERROR:
        verdict = "passed" if abs(error) <= MOST_ERROR else "failed"
    drifted = f"by {drift:.1%}" if drift is not None else "by how much one round cannot tell"
    found = (
        f"{predicted:.3g} ms per token predicted, {measured:.3g} measured, {error:+.1%}; the "
        f"machine drifted {drifted}"
    )
    values |= {"error": error, "drift": drift}
    bound = f"{MOST_ERROR:.0%}, on a machine that drifts by no more"
    return Check(PREDICTION, verdict, found, bound, values)


def _drift(*repeated: Sequence[float]) -> float | None:
    """Return by how much of the least value what was repeated differs, the most of several.

    None if something was taken only once.
    """
    if min(map(len, repeated)) < 2:
        return None
    return max(max(values) / min(values) - 1 for values in repeated)


def predicted_s(
    trace: RoutingTrace, config: TunedConfig, hardware: HardwareProfile
) -> NDArray[np.float64]:
    """Return the predicted mean seconds per output token of every prompt [S] of a recorded decode.

    As in a measurement the first prompt is run once before, to warm up.
    """
    n_sequences = len(trace.sequence_starts)
    run = trace.of_sequences([0, *range(n_sequences)])
    keep = kept_experts(run, config.gating)
    _, timeline = replayed_and_timed(run, config, keep, hardware)
    assert timeline is not None, "hardware was given"  # noqa: S101
    starts = run.sequence_starts[1:]  # of those that count
    counted, seconds = (np.split(each, starts)[1:] for each in (run.is_decode, timeline.step_s))
    return np.array([s[c].mean() for s, c in zip(seconds, counted, strict=True)])


def _summary(measured: Measurement) -> dict[str, float]:
    """Return median and tenth and ninetieth percentile, in milliseconds."""
    low, median, high = 1e3 * np.percentile(measured.samples, [10, 50, 90])
    return {"median_ms": float(median), "p10_ms": float(low), "p90_ms": float(high)}


def _in_words(measured: Measurement) -> str:
    values = _summary(measured)
    return f"{values['median_ms']:.3g} ms ({values['p10_ms']:.3g} to {values['p90_ms']:.3g})"
