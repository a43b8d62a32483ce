"""Exactness, counters, speed, prediction and loss of a model on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from adapmoe_lab.cli.shared import (
    add_executor,
    add_model,
    add_texts,
    given_texts,
    load_model,
    progress,
)
from adapmoe_lab.cli.values import check_output, count


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    verify = commands.add_parser(
        "verify", help="exactness, executor, speed, prediction and loss on this machine"
    )
    add_model(verify, config=True)
    add_executor(verify)
    add_texts(verify)
    verify.add_argument("--new-tokens", type=count(2), default=32, metavar="N")
    verify.add_argument("--repeats", type=count(1), default=3, metavar="N")
    verify.add_argument("--out", type=Path, default=Path("verify.json"), metavar="FILE")
    verify.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from adapmoe_lab.tuning.verify.verify import verify

    texts = None if options.texts is None else given_texts(options)
    check_output(options.out)
    report = verify(
        load_model(options),
        texts=texts,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        progress=progress,
    )
    print(report.table())
    print(f"Wrote {report.save(options.out)}.")
    return 1 if report.failed else 0
