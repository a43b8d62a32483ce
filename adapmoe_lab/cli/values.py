"""What is given on the command line, read or refused before anything long begins."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path


def standard_input() -> str:
    """Return what comes in as text, as a file of it would be read."""
    from adapmoe_lab.evaluation.texts import decoded

    return decoded(sys.stdin.buffer.read(), "standard input")


def check_output(path: Path | None) -> None:
    """Raise OSError unless a file that was asked for can be written; before long work."""
    from adapmoe_lab.records.files import check_writable

    if path is not None:
        check_writable(path)


def count(at_least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers that are not less."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < at_least:
            wanted = f"expected a whole number of at least {at_least}, got {text!r}"
            raise argparse.ArgumentTypeError(wanted)
        return int(text)

    return read


def number(text: str) -> float:
    """Read a number that is neither below zero nor infinite."""
    from adapmoe_lab.records.arguments import finite_number

    try:
        return finite_number("it", float(text), at_least=0)
    except ValueError:
        wanted = f"expected a number of at least 0, got {text!r}"
        raise argparse.ArgumentTypeError(wanted) from None
