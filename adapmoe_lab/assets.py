"""Where the files that ship with the project are: in the source tree, or inside the wheel."""

from __future__ import annotations

import os
from pathlib import Path

TEXT_VARIABLE = "ADAPMOE_LAB_DATA"
_PACKAGE = Path(__file__).resolve().parent


def _folder(name: str) -> Path:
    packed = _PACKAGE / "_assets" / name
    return packed if packed.is_dir() else _PACKAGE.parent / name


def data_folder() -> Path:
    """Return the folder of shipped records and of the demo model."""
    return _folder("data")


def notebooks_folder() -> Path:
    """Return the folder of shipped notebooks."""
    return _folder("notebooks")


def demo_folder() -> Path:
    """Return the folder of the demo checkpoint."""
    return data_folder() / "demo"


def recording_file() -> Path:
    """Return the file of a trained router's routing at 16 layers, 64 experts, top-8, on real text.

    `RoutingTrace.load` reads it: the experts and weights that the third model chose. It has no
    scores of other experts.
    """
    return data_folder() / "third_model" / "routing.npz"


def text_folder() -> Path | None:
    """Return the folder of real text that `$ADAPMOE_LAB_DATA` names, if it exists."""
    named = os.environ.get(TEXT_VARIABLE)
    return Path(named) if named and Path(named).is_dir() else None
