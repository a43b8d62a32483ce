"""The `adapmoe-lab` command. It parses, calls, and prints; what it calls is imported on use."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from adapmoe_lab.cli.commands import (
    bench,
    doctor,
    evaluate,
    generate,
    lab,
    profile,
    tune,
    verify,
)

PROGRAM = "adapmoe-lab"
COMMANDS = (lab, generate, profile, tune, evaluate, bench, verify, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 if it failed, 2 for wrong usage."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError, MemoryError) as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM} {options.command}: stopped.", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    program = argparse.ArgumentParser(
        prog=PROGRAM,
        description="See, tune and run Mixture-of-Experts models whose experts do not fit the GPU.",
    )
    commands = program.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return program
