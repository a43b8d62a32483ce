"""Open JupyterLab at the tour."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    lab = commands.add_parser("lab", help="open JupyterLab at the tour")
    lab.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("adapmoe-lab-notebooks"),
        help="where the notebooks are; missing ones are copied there (default: %(default)s)",
    )
    lab.add_argument("--port", type=int, help="port on 127.0.0.1 (default: the first free one)")
    lab.add_argument("--no-browser", action="store_true", help="print the address, open nothing")
    lab.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from adapmoe_lab.workbench.jupyter import TOUR, copy_notebooks, open_lab

    for notebook in copy_notebooks(options.folder):
        print(f"Copied {notebook}.")
    print(f"Opening JupyterLab at {options.folder / TOUR}. Stop it with Ctrl-C.", flush=True)
    return open_lab(options.folder, options.port, not options.no_browser)
