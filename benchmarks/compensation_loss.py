"""What it costs to skip experts, by what takes their place, on held-out text.

`python benchmarks/compensation_loss.py MODEL --text FOLDER --out FILE`

One cut on the share for all layers. Cuts and surrogates come from one half of the
held-out documents of the folder (layout in data/README.md), the loss from the other half, paired by
text. Then what the surrogates cost in time while decoding with every expert at hand, and the loss
at rank 16 by the amount of calibration text.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from held_out import DOMAINS, PIECE_TOKENS, calibration_and_evaluation

import adapmoe_lab as lab
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.gating.uniform import UniformCut
from adapmoe_lab.records import GatingTable, LossReport, Surrogates, TunedConfig
from adapmoe_lab.records.files import save_json
from adapmoe_lab.records.standard_error import error_text

SKIPPED_FRACTIONS = (0.125, 0.25, 0.5)
TIMED_FRACTION = 0.25
OTHER_CALIBRATION_TOKENS = (8_000, 60_000)
N_ROUNDS = 6

BEST = "rank 16, gradient-weighted, scaled kept"


def surrogates_tried(hidden_size: int) -> dict[str, dict[str, Any] | None]:
    """Return what replaces a skipped expert, and how it is fitted; None for nothing."""
    return {
        "nothing, kept weights renormalised": None,
        "nothing, kept weights unchanged": None,
        "mean output": {"rank": 0, "fit_gain": False},
        "mean output, scaled kept": {"rank": 0},
        "rank 4": {"rank": 4, "fit_gain": False},
        "rank 16": {"rank": 16, "fit_gain": False},
        BEST: {"rank": 16, "gradient_weighted": True},
        "full rank": {"rank": hidden_size, "fit_gain": False},
    }


class Losses:
    """Measures configs of one model on one list of texts against the untuned model."""

    def __init__(self, model: LabModel, texts: Sequence[str]) -> None:
        """Measure the baseline."""
        self._model = model
        self._texts = texts
        self._untuned = TunedConfig.untuned(model.spec)
        self.baseline = self._report(self._untuned)

    def row(self, name: str, table: GatingTable, surrogates: Surrogates | None) -> dict[str, Any]:
        """Measure one config and print it."""
        config = replace(self._untuned, gating=table, compensation=surrogates)
        report = self._report(config)
        increase, error = report.increase_over(self.baseline)
        print(
            f"{name:54} skipped {report.skipped_fraction:5.1%}: "
            f"{1e3 * increase:+7.1f} {error_text(error, '.1f', 1e3)} millinats",
            flush=True,
        )
        return {
            "stand_in": name,
            "increase_nats": increase,
            "increase_se": error,
            "surrogate_bytes": surrogates.n_bytes(2) if surrogates else 0,
            "report": report.to_json(),
        }

    def _report(self, config: TunedConfig) -> LossReport:
        return lab.evaluate_loss(self._model, config, self._texts, max_tokens=PIECE_TOKENS)


def decode_seconds(
    model: LabModel, table: GatingTable, surrogates: Surrogates | None, prompts: Sequence[str]
) -> dict[str, list[float]]:
    """Return seconds per output token with every expert resident, the kinds taking turns."""
    spec = model.spec
    resident = replace(TunedConfig.untuned(spec), plan=slots_plan(spec, spec.n_experts))
    gated = replace(resident, gating=table)
    kinds = {
        "nothing skipped": resident,
        "skipped": gated,
        "skipped, surrogates": replace(gated, compensation=surrogates),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(N_ROUNDS):
        for name, config in kinds.items():
            report = lab.measure_latency(model, config, prompts, new_tokens=48, repeats=1)
            seconds[name] += report.decode.samples.tolist()
    return seconds


def time_ratio(seconds: dict[str, list[float]]) -> float:
    """Print and return decoding's time with surrogates over that without."""
    medians = {kind: float(np.median(samples)) for kind, samples in seconds.items()}
    ratio = medians["skipped, surrogates"] / medians["skipped"]
    told = ", ".join(f"{kind} {1e3 * median:.2f} ms" for kind, median in medians.items())
    print(f"decoding with surrogates takes {ratio:.3f} of the time without ({told})", flush=True)
    return ratio


def main() -> int:
    """Measure every surrogate, print a table, write the raw losses; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="demo, or a folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calibration-tokens", type=int, default=18_000)
    parser.add_argument("--evaluation-tokens", type=int, default=40_000)
    options = parser.parse_args()
    link = {"link": "none"} if options.device == "cpu" else {}
    model = lab.load(options.model, dtype="float32", device=options.device, **link)
    calibration, held_out = calibration_and_evaluation(
        options.text, options.calibration_tokens, options.evaluation_tokens
    )
    with tempfile.TemporaryDirectory() as project:
        trace = lab.profile(model, calibration, max_tokens=PIECE_TOKENS, project=project)
    rule = UniformCut(trace)
    tables = {fraction: rule.table(fraction) for fraction in SKIPPED_FRACTIONS}
    losses, ways = Losses(model, held_out), surrogates_tried(model.spec.hidden_size)
    fitted = {
        name: lab.fit_surrogates(model, calibration, max_tokens=PIECE_TOKENS, **how)
        if how
        else None
        for name, how in ways.items()
    }
    rows = [
        losses.row(name, replace(table, renormalise="renormalised" in name), fitted[name])
        for name in ways
        for table in tables.values()
    ]
    document = {
        "conditions": {**measurement_conditions(model), "domains": DOMAINS},
        "calibration_tokens": trace.n_tokens,
        "baseline": losses.baseline.to_json(),
        "rows": rows,
    }
    save_json(options.out, document)
    seconds = decode_seconds(model, tables[TIMED_FRACTION], fitted[BEST], held_out[:4])
    document |= {"decode_s": seconds, "decode_time_ratio": time_ratio(seconds)}
    save_json(options.out, document)
    by_tokens = []
    for n_tokens in OTHER_CALIBRATION_TOKENS:
        other, _ = calibration_and_evaluation(options.text, n_tokens, options.evaluation_tokens)
        one = lab.fit_surrogates(model, other, max_tokens=PIECE_TOKENS, **ways[BEST] or {})
        name = f"{BEST}, {one.n_tokens} tokens"
        by_tokens += [losses.row(name, table, one) for table in tables.values()]
    save_json(options.out, document | {"rows_by_calibration_tokens": by_tokens})
    return 0


if __name__ == "__main__":
    sys.exit(main())
