"""Record which experts texts use."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from adapmoe_lab.cli.shared import add_model, add_texts, given_texts, load_model, progress
from adapmoe_lab.cli.values import check_output


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    profile = commands.add_parser("profile", help="record which experts texts use")
    add_model(profile, config=True)
    add_texts(profile)
    profile.add_argument("--out", type=Path, metavar="FILE", help="also write the trace here")
    profile.add_argument("--again", action="store_true", help="record even if a trace was kept")
    profile.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from adapmoe_lab.profiling.routing.profile import profile

    texts = given_texts(options)
    check_output(options.out)
    trace = profile(load_model(options), texts, reuse=not options.again, progress=progress)
    if options.out is not None:
        print(f"Wrote {trace.save(options.out)}.")
