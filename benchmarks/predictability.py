"""How well the experts of later layers are predicted on held-out text, by predictor and distance.

`python benchmarks/predictability.py MODEL --text FOLDER --out FILE.json`

Predictors are fitted on one half of the held-out documents of the folder (layout in
data/README.md) and judged on the other, token by token, with nothing skipped. Recall is of the
router's K experts among the likeliest K and K + 1, with standard errors over texts. Beside it
stands what was measured before on another model of the same kind.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from held_out import DOMAINS, PIECE_TOKENS, calibration_and_evaluation
from numpy.typing import NDArray

import adapmoe_lab as lab
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.records import RoutingTrace
from adapmoe_lab.records.files import save_json
from adapmoe_lab.records.standard_error import error_text
from adapmoe_lab.simulation.statistics.predictability import recall_and_precision, with_baselines

CALIBRATION_TOKENS = 18_000
EVALUATION_TOKENS = 20_000

REFERENCE = {
    ("next_router", 1): 0.774,
    ("next_router", 2): 0.709,
    ("next_router", 3): 0.639,
    ("ridge", 1): 0.845,
    ("ridge", 2): 0.793,
    ("ridge", 3): 0.754,
    ("own_norm", 1): 0.884,
    ("token_table", 0): 0.959,
    ("last_hidden", 0): 0.579,
    ("token_embedding", 0): 0.916,
    ("frequency", 0): 0.321,
    ("previous_token", 0): 0.413,
    ("token_table_all", 0): 0.720,
}
"""Recall on a Mixtral of 16.6M parameters that was trained for 4 minutes, not the demo."""


def judge(trace: RoutingTrace) -> list[dict[str, Any]]:
    """Return recall and precision of everything that was predicted, one row each, and print it."""
    rows = []
    top_k = trace.spec.top_k
    for predictor, by_distance in trace.predictions.items():
        for distance in by_distance:
            row: dict[str, Any] = {"predictor": predictor, "distance": distance}
            for n_candidates in (top_k, top_k + 1):
                found = recall_and_precision(trace, predictor, distance, candidates=n_candidates)
                row[f"with_{n_candidates}"] = {
                    "mean_recall": found.mean_recall,
                    "mean_precision": found.mean_precision,
                    "recall": by_layer(found.recall),
                    "recall_se": by_layer(found.recall_se),
                    "precision": by_layer(found.precision),
                    "precision_se": by_layer(found.precision_se),
                }
            row["reference_recall"] = REFERENCE.get((predictor, distance))
            print(line_of(row, top_k), flush=True)
            rows.append(row)
    return rows


def by_layer(values: NDArray[np.float64]) -> list[float | None]:
    """Return one value per layer, None for layers that are not predicted."""
    return [None if np.isnan(value) else float(value) for value in values]


def line_of(row: dict[str, Any], top_k: int) -> str:
    """Say a row in one line."""
    exact, wider = row[f"with_{top_k}"], row[f"with_{top_k + 1}"]
    first = next(value for value in exact["recall"] if value is not None)
    reference = row["reference_recall"]
    return (
        f"{row['predictor']:16} +{row['distance']}: recall {exact['mean_recall'][0]:.3f} "
        f"{error_text(exact['mean_recall'][1], '.3f')}, first layer predicted {first:.3f}, "
        "one candidate more "
        f"{wider['mean_recall'][0]:.3f}" + (f"; before {reference:.3f}" if reference else "")
    )


def traces(model: LabModel, folder: Path) -> tuple[RoutingTrace, RoutingTrace, dict[str, Any]]:
    """Return calibration and evaluation traces, and what was fitted in between."""
    texts = calibration_and_evaluation(folder, CALIBRATION_TOKENS, EVALUATION_TOKENS)
    fitted = lab.fit_predictors(model, texts[0], max_tokens=PIECE_TOKENS)
    n_candidates = min(model.spec.top_k + 1, model.spec.n_experts)
    with tempfile.TemporaryDirectory() as project:
        known, trace = (
            lab.profile(
                model,
                half,
                max_tokens=PIECE_TOKENS,
                predictors=fitted,
                n_candidates=n_candidates,
                project=project,
            )
            for half in texts
        )
    described = {
        "n_tokens": fitted.n_tokens,
        "n_bytes": fitted.n_bytes,
        "table_tokens": len(fitted.table_tokens),
    }
    return known, with_baselines(trace, known, n_candidates), described


def main() -> int:
    """Judge every predictor, print a table, write the raw numbers; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="demo, or a folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    link = {"link": "none"} if options.device == "cpu" else {}
    model = lab.load(options.model, dtype="float32", device=options.device, **link)
    conditions = measurement_conditions(model)
    known, trace, fitted = traces(model, options.text)
    document = {
        "conditions": {**conditions, "domains": DOMAINS},
        "calibration_tokens": known.n_tokens,
        "evaluation_tokens": trace.n_tokens,
        "evaluation_texts": len(trace.sequence_starts),
        "fitted": fitted,
        "rows": judge(trace),
    }
    save_json(options.out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
