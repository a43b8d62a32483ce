"""Which experts to skip: rules and sensitivities judged by the loss they cost on held-out text.

`python benchmarks/gating_criteria.py MODEL --text FOLDER --out FILE`

Sensitivities and cuts come from one half of the held-out documents of the folder (layout in
data/README.md), losses from the other, paired by text. Two tables: how well each sensitivity ranks
the layers; what each criterion costs at equal skipping.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from held_out import PIECE_TOKENS, calibration_and_evaluation

import adapmoe_lab as lab
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.evaluation.loss import token_sequences
from adapmoe_lab.policies.gating.least_loss import LeastLoss
from adapmoe_lab.policies.gating.registry import RULES
from adapmoe_lab.profiling.sensitivity.estimators import ESTIMATORS, MEASURED
from adapmoe_lab.profiling.sensitivity.loss_change import LossChanges, loss_changes
from adapmoe_lab.profiling.sensitivity.sensitivity import sensitivities
from adapmoe_lab.records import GatingTable, RoutingTrace, SensitivityProfile, TunedConfig
from adapmoe_lab.records.files import save_json
from adapmoe_lab.simulation.statistics.jackknife import jackknife
from adapmoe_lab.simulation.statistics.rank_agreement import rank_correlation

FRACTIONS = (0.1, 0.25)

Profiles = dict[str, SensitivityProfile]


@dataclass(frozen=True)
class Setting:
    """One way to skip: a criterion, whether the kept weights are renormalised, how much."""

    criterion: str
    renormalise: bool
    fraction: float
    table: GatingTable


def settings(trace: RoutingTrace, profiles: Profiles, renormalise: bool) -> list[Setting]:
    """Return every criterion at every fraction."""
    rules = {
        "uniform": RULES["uniform"](trace, profiles["directional"]),
        "adapmoe": RULES["adapmoe"](trace, profiles["fisher"]),
        **{f"curve: {name}": LeastLoss(trace, profile) for name, profile in profiles.items()},
    }
    return [
        Setting(name, renormalise, fraction, _renormalised(rule.table(fraction), renormalise))
        for name, rule in rules.items()
        for fraction in FRACTIONS
    ]


def _renormalised(table: GatingTable, renormalise: bool) -> GatingTable:
    return GatingTable(table.cuts, renormalise, table.quantity)


def measured(
    model: LabModel, texts: list[str], chosen: list[Setting], max_tokens: int
) -> tuple[LossChanges, list[dict[str, object]]]:
    """Measure settings on texts; return the changes and a row for each."""
    sequences = token_sequences(model, texts, max_tokens)
    ungated = TunedConfig.untuned(model.spec)
    changes = loss_changes(model, ungated, sequences, [setting.table for setting in chosen])
    increase, error = changes.mean_ablation
    rows = []
    for c, setting in enumerate(chosen):
        rows.append(
            {
                "criterion": setting.criterion,
                "renormalise": setting.renormalise,
                "fraction": setting.fraction,
                "skipped_fraction": float(changes.skipped_fraction[c]),
                "increase_nats": float(increase[c]),
                "increase_se": float(error[c]),
                "cuts": setting.table.cuts[:, 0].tolist(),
            }
        )
    return changes, rows


def compare_with_adapmoe(changes: LossChanges, rows: list[dict[str, object]]) -> None:
    """Add to each row how far its loss is from the rule's and the uniform cut's, paired."""
    per_token = changes.loss / changes.n_predicted[:, None]
    at = {(r["criterion"], r["renormalise"], r["fraction"]): c for c, r in enumerate(rows)}
    for c, row in enumerate(rows):
        for other in ("adapmoe", "uniform"):
            theirs = per_token[:, at[other, row["renormalise"], row["fraction"]]]
            difference, error = jackknife(
                lambda w, ours=per_token[:, c], theirs=theirs: w @ (ours - theirs),
                changes.n_predicted,
            )
            row[f"over_{other}_nats"] = float(difference)
            row[f"over_{other}_se"] = float(error)


def ranking(profiles: Profiles) -> list[dict[str, object]]:
    """Return each sensitivity's rank correlation over layers with the measured ones."""
    return [
        {
            "estimator": name,
            "cost": profile.cost.tolist(),
            "standard_error": profile.standard_error.tolist(),
            "n_tokens": profile.n_tokens,
            **{
                f"rank_correlation_with_{truth}": rank_correlation(
                    profile.cost, profiles[truth].cost
                )
                for truth in MEASURED
            },
        }
        for name, profile in profiles.items()
    ]


def print_ranking(rows: list[dict[str, object]]) -> None:
    """Print how each sensitivity ranks the layers."""
    print("\nrank correlation over layers with one layer's ablation, kept weights renormalised")
    for row in rows:
        print(
            f"{row['estimator']:22} {row['rank_correlation_with_ablation']:+.2f} loss, "
            f"{row['rank_correlation_with_divergence']:+.2f} divergence",
            flush=True,
        )


def print_criteria(rows: list[dict[str, object]]) -> None:
    """Print loss increases in millinats, one line per criterion."""
    for renormalise in (True, False):
        print(f"\nmillinats per token, kept weights {'' if renormalise else 'not '}renormalised")
        print(f"{'criterion':22}" + "".join(f"{f'skipped {f:.0%}':>18}" for f in FRACTIONS))
        for name in dict.fromkeys(row["criterion"] for row in rows):
            cells = [
                f"{1e3 * r['increase_nats']:9.2f} ± {1e3 * r['increase_se']:.2f}"
                for r in rows
                if r["criterion"] == name and r["renormalise"] == renormalise
            ]
            if not cells:
                continue
            print(f"{name:22}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def main() -> int:
    """Measure, print the tables, write the file; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="demo, or a folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calibration-tokens", type=int, default=18_000)
    parser.add_argument("--evaluation-tokens", type=int, default=36_000)
    options = parser.parse_args()
    link = {"link": "none"} if options.device == "cpu" else {}
    model = lab.load(options.model, dtype="float32", device=options.device, **link)
    calibration, evaluation = calibration_and_evaluation(
        options.text, options.calibration_tokens, options.evaluation_tokens
    )
    trace = lab.profile(model, calibration, max_tokens=PIECE_TOKENS)
    by_renormalise = {
        renormalise: sensitivities(
            model,
            calibration,
            names,
            renormalise=renormalise,
            max_tokens=PIECE_TOKENS,
            anchored=False,
        )
        for renormalise, names in ((True, (*ESTIMATORS, *MEASURED)), (False, tuple(ESTIMATORS)))
    }
    ranks = ranking(by_renormalise[True])
    print_ranking(ranks)
    chosen = [s for r, p in by_renormalise.items() for s in settings(trace, p, r)]
    changes, rows = measured(model, evaluation, chosen, PIECE_TOKENS)
    compare_with_adapmoe(changes, rows)
    print_criteria(rows)
    document = {
        "conditions": measurement_conditions(model),
        "calibration_tokens": int(trace.n_tokens),
        "evaluation_tokens": int(changes.n_predicted.sum()),
        "criteria": rows,
        "ranking": ranks,
    }
    save_json(options.out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
