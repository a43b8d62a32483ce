"""What storing the experts in fewer bits costs on held-out text.

`python benchmarks/precision_loss.py --text FOLDER --out FILE`

Every precision is compared with the checkpoint's own bfloat16 weights on the `valid` files of the
folder (layout in data/README.md), paired by text, computed in float32. Round-to-nearest takes the
same bytes as the solver that loading uses.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from held_out import DOMAINS, held_out_texts

import adapmoe_lab as lab
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.quantised.packed import PackedMatrix
from adapmoe_lab.engine.quantised.quantise import quantise
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.records.files import save_json
from adapmoe_lab.records.standard_error import error_text

PRECISIONS = ("bfloat16", "int8", "int4", "mxfp4", "int3", "int2")


def load(precision: str) -> LabModel:
    """Load the demo with its experts stored in a precision."""
    return lab.load("demo", dtype="float32", expert_dtype=precision, device="cpu", link="none")


def round_to_nearest(model: LabModel, plain: LabModel) -> None:
    """Store the plain model's experts in a packed model anew, without a solver."""
    store, source = model.store, plain.store
    for layer, expert in store.numbers():
        exact = source.views(layer, expert, source.buffer(layer, expert))
        packed = store.views(layer, expert, store.buffer(layer, expert))
        for name, matrix in packed.items():
            if isinstance(matrix, PackedMatrix):
                quantise(exact[name], matrix.precision, out=matrix.data, solver="nearest")


def main() -> int:
    """Measure every precision, print a table, write the raw losses; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    texts = held_out_texts(options.text)
    plain = load("float32")
    baseline = lab.evaluate_loss(plain, None, texts)
    rows = []
    for precision in PRECISIONS:
        model = load(precision)
        solvers = ["hqq", "nearest"] if precision.startswith("int") else ["nearest"]
        for solver in solvers:
            if precision.startswith("int") and solver == "nearest":
                round_to_nearest(model, plain)
            report = lab.evaluate_loss(model, None, texts)
            increase, error = report.increase_over(baseline)
            bits = 8 * model.store.n_bytes / (plain.store.n_bytes / 4)
            rows.append(
                {
                    "precision": precision,
                    "solver": solver,
                    "bits_per_weight": bits,
                    "increase_nats": increase,
                    "increase_se": error,
                    "report": report.to_json(),
                }
            )
            print(
                f"{precision:9} {solver:8} {bits:5.2f} bits/weight: "
                f"{1e3 * increase:+8.2f} {error_text(error, '.2f', 1e3)} millinats",
                flush=True,
            )
    document = {
        "conditions": {**measurement_conditions(plain), "domains": DOMAINS},
        "baseline": baseline.to_json(),
        "rows": rows,
    }
    save_json(options.out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
