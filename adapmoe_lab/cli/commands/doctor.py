"""Versions, GPU, memory, link speed, and what would fit."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    doctor = commands.add_parser("doctor", help="versions, GPU, memory, link speed, what would fit")
    doctor.add_argument(
        "model", nargs="?", help="demo, a folder or a hub id: what it takes, by its config alone"
    )
    doctor.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    doctor.add_argument("--revision", help="branch, tag or commit of a hub id")
    doctor.add_argument("--max-context-tokens", type=int, metavar="N", help="default: 4096")
    doctor.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from adapmoe_lab.cli.doctor import examine, model_report, report

    if options.model is None:
        print(report(examine()))
        return
    from adapmoe_lab.models.checkpoint.checkpoint import look_at_model

    model = look_at_model(options.model, options.dtype, options.revision)
    print(model_report(model, examine(), options.max_context_tokens))
