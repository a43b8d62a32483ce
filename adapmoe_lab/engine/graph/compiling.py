"""A model's forward, compiled for its captured step.

Compiling fuses what is not experts; it takes some 20 seconds, or fewer where this machine has
compiled the same before: what the compiler makes is kept in the project's cache folder.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from adapmoe_lab.records.files import cache_folder

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch keeps what it compiled, if it is set."""
N_KEPT = 64
"""Forwards of one class that are kept compiled; torch's own 8 are soon used up by other models."""


class CompileWarning(UserWarning):
    """A forward cannot be compiled; its step is captured as it is."""


def compiled(hf: nn.Module) -> Any:
    """Return a model's forward pass, compiled where it is first called, within `compiling`."""
    return torch.compile(hf, dynamic=False)


@contextmanager
def compiling() -> Iterator[None]:
    """Let forwards be compiled, each for the hooks on its modules, and kept on the disk."""
    settings = {"cache_size_limit": N_KEPT, "skip_nnmodule_hook_guards": False}
    with ExitStack() as undoing:
        if CACHE_VARIABLE not in os.environ:
            os.environ[CACHE_VARIABLE] = str(cache_folder() / "compiled")
            undoing.callback(os.environ.pop, CACHE_VARIABLE)
        undoing.enter_context(torch._dynamo.config.patch(settings))
        undoing.enter_context(warnings.catch_warnings())
        # of float32, which no captured step computes in
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        yield
