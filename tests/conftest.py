"""Fixtures that every test may use: small random checkpoints and models loaded from them."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import save_tiny_mixtral
from hypothesis import settings

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.loading import load

# A machine that does something else too is no failure.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random Mixtral: 3 layers, 4 experts, top-2, float32."""
    return save_tiny_mixtral(tmp_path_factory.mktemp("tiny-mixtral"))


@pytest.fixture
def load_tiny(tiny_checkpoint: Path) -> Callable[..., LabModel]:
    """Return a loader of the tiny checkpoint without an emulated link."""

    def load_it(**arguments: object) -> LabModel:
        return load(tiny_checkpoint, **{"link": "none", "device": "cpu", **arguments})

    return load_it


@pytest.fixture
def texts() -> list[str]:
    """Return three short texts of different kinds."""
    return [
        "Once upon a time there was a little girl who lived in the woods.",
        "def square(x):\n    return x * x\n\nprint(square(3))\n",
        "The king told the queen that he would never come home again.",
    ]
