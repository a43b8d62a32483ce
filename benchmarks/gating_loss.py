"""What each rule of choosing cuts costs on held-out text, with and without renormalising.

`python benchmarks/gating_loss.py --text FOLDER --out benchmarks/results/gating-loss-demo.json`

Cuts and sensitivity come from the shipped calibration texts; the loss is measured on the `valid`
files of the folder (layout in data/README.md), paired by text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

import adapmoe_lab as lab
from adapmoe_lab.engine.hardware import measurement_conditions
from adapmoe_lab.records import LossReport, TunedConfig
from adapmoe_lab.records.files import save_json
from adapmoe_lab.tuning.tune import GATING_RULES

DOMAINS = ("books_children_en", "books_fiction_en", "python_stdlib", "novels_de")
TEXTS_PER_DOMAIN = 24
TEXT_CHARACTERS = 900


def held_out_texts(folder: Path) -> list[str]:
    """Return evenly spaced pieces of every domain's held-out documents."""
    pieces = []
    for domain in DOMAINS:
        with gzip.open(folder / domain / "valid.jsonl.gz", "rt", encoding="utf-8") as lines:
            whole = "\n\n".join(json.loads(line)["text"] for line in lines)
        starts = np.linspace(0, len(whole), TEXTS_PER_DOMAIN, endpoint=False).astype(int)
        pieces += [whole[start : start + TEXT_CHARACTERS] for start in starts]
    return pieces


def main() -> int:
    """Measure every rule, print a table, write the raw losses; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--skipped-fraction", type=float, default=0.25)
    options = parser.parse_args()
    model = lab.load("demo", dtype="float32", device="cpu", link="none")
    calibration = lab.calibration_texts()
    calibration = calibration[: len(calibration) // 2]
    trace, sensitivity = lab.profile(model, calibration), lab.sensitivity(model, calibration)
    texts = held_out_texts(options.text)
    ungated = TunedConfig.untuned(model.spec)
    baseline = lab.evaluate_loss(model, ungated, texts)
    rows = []
    for rule, choose in GATING_RULES.items():
        table = choose(trace, sensitivity, options.skipped_fraction)
        predicted, _ = sensitivity.increase(table.cuts[:, 0])
        for renormalise in (False, True):
            config = replace(ungated, gating=replace(table, renormalise=renormalise))
            report = lab.evaluate_loss(model, config, texts)
            rows.append(_row(rule, renormalise, float(predicted.sum()), report, baseline))
            print(rows[-1]["line"], flush=True)
    document = {
        "conditions": {**measurement_conditions(model), "domains": DOMAINS},
        "baseline": baseline.to_json(),
        "rows": rows,
    }
    save_json(options.out, document)
    return 0


def _row(
    rule: str, renormalise: bool, predicted: float, report: LossReport, baseline: LossReport
) -> dict[str, object]:
    increase, error = report.increase_over(baseline)
    line = (
        f"{rule:8} renormalise={renormalise!s:5} skipped {report.skipped_fraction:.1%}: "
        f"{1e3 * increase:+.1f} ± {1e3 * error:.1f} millinats, predicted {1e3 * predicted:+.1f}"
    )
    return {
        "rule": rule,
        "renormalise": renormalise,
        "increase_nats": increase,
        "increase_se": error,
        "predicted_nats": predicted,
        "report": report.to_json(),
        "line": line,
    }


if __name__ == "__main__":
    sys.exit(main())
