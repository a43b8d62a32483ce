"""What skipping is predicted to cost against what it costs, on held-out text.

`python benchmarks/predicted_loss.py MODEL --text FOLDER --out FILE`

Predictions and cuts come from one half of the held-out text of the folder (layout in
data/README.md), losses from the other, paired by text. The halves are of alternate pieces, alike as
a user's own texts are, or of other documents altogether. A prediction agrees if it is within two
standard errors of the difference or within 20 %, whichever is more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from held_out import PIECE_TOKENS, calibration_and_evaluation

import adapmoe_lab as lab
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.evaluation.loss import token_sequences
from adapmoe_lab.policies.gating.registry import RULES
from adapmoe_lab.profiling.sensitivity.loss_change import LossChanges, loss_changes
from adapmoe_lab.records import GatingTable, RoutingTrace, SensitivityProfile, TunedConfig
from adapmoe_lab.records.files import save_json

ALLOWED = 0.2
MEASURABLE = 0.15
"""Largest standard error, as a share of the effect, with which a measurement tells anything."""


@dataclass(frozen=True)
class Prediction:
    """One way to skip and what it is predicted to cost."""

    rule: str
    fraction: float
    table: GatingTable
    increase: float
    error: float


def predictions(
    trace: RoutingTrace, profile: SensitivityProfile, renormalise: bool, fractions: Sequence[float]
) -> list[Prediction]:
    """Return what every rule is predicted to cost at every skipped fraction."""
    found = []
    for name, rule in RULES.items():
        prepared = rule(trace, profile)
        for fraction in fractions:
            table = replace(prepared.table(fraction), renormalise=renormalise)
            found.append(
                Prediction(name, fraction, table, *profile.total_increase(table.cuts[:, 0]))
            )
    return found


def judged(predicted: Sequence[Prediction], changes: LossChanges) -> list[dict[str, Any]]:
    """Return a row for each prediction: itself, what was measured, and whether they agree."""
    rows = []
    for c, (p, got, error) in enumerate(zip(predicted, *changes.mean_ablation, strict=True)):
        bound = max(2 * float(np.hypot(error, p.error)), ALLOWED * got)
        rows.append(
            {
                "rule": p.rule,
                "renormalise": p.table.renormalise,
                "fraction": p.fraction,
                "skipped_fraction": float(changes.skipped_fraction[c]),
                "increase_nats": float(got),
                "increase_se": float(error),
                "predicted_nats": p.increase,
                "predicted_se": p.error,
                "measurable": bool(error <= MEASURABLE * got),
                "agrees": bool(abs(p.increase - got) <= bound),
                "cuts": p.table.cuts[:, 0].tolist(),
                "loss_nats": changes.loss[:, c].tolist(),
            }
        )
    return rows


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print every row in millinats, and how many of the measurable ones agree."""
    print("\nmillinats per token")
    for row in rows:
        got, error, predicted, predicted_error = (
            1e3 * row[name]
            for name in ("increase_nats", "increase_se", "predicted_nats", "predicted_se")
        )
        kept = "renormalised" if row["renormalise"] else "unchanged"
        print(
            f"{row['rule']:8} kept weights {kept:12} skipped {row['skipped_fraction']:5.1%}: "
            f"measured {got:5.2f} ± {error:.2f} ({error / got:.0%}), "
            f"predicted {predicted:5.2f} ± {predicted_error:.2f}, {predicted / got - 1:+.0%}, "
            f"{'agrees' if row['agrees'] else 'DIFFERS'}"
            f"{'' if row['measurable'] else ', not measurable on this much text'}"
        )
    agreeing = [row["agrees"] for row in rows if row["measurable"]]
    print(
        f"{sum(agreeing)} of {len(agreeing)} measurable to {MEASURABLE:.0%} agree; "
        f"{sum(row['agrees'] for row in rows)} of all {len(rows)}",
        flush=True,
    )


def main() -> int:
    """Predict, measure, print the table, write the file; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="demo, or a folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=("pieces", "documents"), default="pieces")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calibration-tokens", type=int, default=32_000)
    parser.add_argument("--evaluation-tokens", type=int, default=80_000)
    parser.add_argument(
        "--renormalised", type=float, nargs="*", default=[0.15, 0.2], help="skipped fractions"
    )
    parser.add_argument(
        "--unchanged", type=float, nargs="*", default=[0.2], help="with kept weights as they are"
    )
    options = parser.parse_args()
    link = {"link": "none"} if options.device == "cpu" else {}
    model = lab.load(options.model, dtype="float32", device=options.device, **link)
    calibration, evaluation = calibration_and_evaluation(
        options.text, options.calibration_tokens, options.evaluation_tokens, options.split
    )
    trace = lab.profile(model, calibration, max_tokens=PIECE_TOKENS)
    predicted: list[Prediction] = []
    for renormalise, fractions in ((True, options.renormalised), (False, options.unchanged)):
        if not fractions:
            continue
        profile = lab.sensitivity(
            model, calibration, renormalise=renormalise, max_tokens=PIECE_TOKENS
        )
        predicted += predictions(trace, profile, renormalise, fractions)
        print(f"predicted with renormalise={renormalise}", flush=True)
    changes = loss_changes(
        model,
        TunedConfig.untuned(model.spec),
        token_sequences(model, evaluation, PIECE_TOKENS),
        [prediction.table for prediction in predicted],
    )
    rows = judged(predicted, changes)
    print_rows(rows)
    document = {
        "conditions": measurement_conditions(model),
        "split": options.split,
        "calibration_tokens": int(trace.n_tokens),
        "n_predicted": changes.n_predicted.tolist(),
        "rows": rows,
    }
    save_json(options.out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
