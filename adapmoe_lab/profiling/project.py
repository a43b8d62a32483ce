"""The project folder: what was learnt about a model, kept and found again."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER_VARIABLE = "ADAPMOE_LAB_PROJECT"
DEFAULT_FOLDER = "adapmoe-lab-project"


def project_folder(folder: str | Path | None = None) -> Path:
    """Return the folder that keeps traces and profiles.

    The one given, else `$ADAPMOE_LAB_PROJECT`, else `adapmoe-lab-project` here.
    """
    return Path(folder or os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER)


def say(note: str) -> None:
    """Tell the user what was done on their behalf."""
    print(note)
