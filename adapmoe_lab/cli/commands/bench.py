"""Decode ratios and loss, with and without skipping."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from adapmoe_lab.cli.shared import add_model, add_texts, given_texts, load_model
from adapmoe_lab.cli.values import check_output, count, number


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    bench = commands.add_parser("bench", help="decode ratios and loss, with and without skipping")
    add_model(bench, config=False)
    add_texts(bench)
    bench.add_argument(
        "--targets",
        nargs="+",
        metavar="LINK",
        help="links to emulate, none for no link (default: all)",
    )
    bench.add_argument("--skipped-fraction", type=number, nargs="+", default=[0.125, 0.25])
    bench.add_argument(
        "--slots-per-layer", type=count(0), metavar="N", help="default: half the experts"
    )
    bench.add_argument("--method", default="uniform", help="uniform, adapmoe or curve")
    bench.add_argument("--new-tokens", type=count(2), default=48, metavar="N")
    bench.add_argument("--rounds", type=count(1), default=5, metavar="N")
    bench.add_argument("--out", type=Path, metavar="FILE", help="write all samples as JSON")
    bench.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from adapmoe_lab.tuning.compare import run_bench

    texts = None if options.texts is None else given_texts(options)
    check_output(options.out)
    report = run_bench(
        load_model(options),
        targets=options.targets,
        skipped_fractions=options.skipped_fraction,
        slots_per_layer=options.slots_per_layer,
        method=options.method,
        texts=texts,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
    )
    print(report.table())
    if options.out is not None:
        print(f"Wrote {report.save(options.out)}.")
