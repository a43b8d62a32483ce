"""The project folder: what was learnt about a model, kept and found again."""

from __future__ import annotations

import os
from pathlib import Path

from adapmoe_lab.records.files import check_writable

FOLDER_VARIABLE = "ADAPMOE_LAB_PROJECT"
DEFAULT_FOLDER = "adapmoe-lab-project"
TRACES = "traces"


def project_folder(folder: str | Path | None = None) -> Path:
    """Return the folder that keeps traces and profiles.

    The one given, else `$ADAPMOE_LAB_PROJECT`, else `adapmoe-lab-project` here.
    """
    return Path(folder or os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER)


def check_project(folder: str | Path | None = None) -> None:
    """Raise OSError, which names the remedy, unless files can be kept in the project folder."""
    try:
        check_writable(project_folder(folder) / TRACES / "trace.npz")
    except OSError as error:
        raise type(error)(
            f"What is learnt cannot be kept: {error} Pass project=, or set ${FOLDER_VARIABLE}."
        ) from error


def report(note: str) -> None:
    """Show the user what was done on their behalf."""
    print(note)
