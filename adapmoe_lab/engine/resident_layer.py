"""How fast this machine decodes when nothing has to be loaded."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from adapmoe_lab.engine.executor import Executor
from adapmoe_lab.engine.generation.tokens import generate_tokens

PROMPT_TOKENS = 8


def decode_step_times(hf: nn.Module, engine: Executor, n_steps: int) -> NDArray[np.float64]:
    """Return the seconds of `n_steps` decode steps after a short fixed prompt."""
    tokens = generate_tokens(engine.decoder(hf), torch.arange(PROMPT_TOKENS), n_steps + 1)
    return np.diff([engine.clock.now() for _ in tokens])


def resident_layer_s(hf: nn.Module, engine: Executor, n_runs: int, n_steps: int = 24) -> float:
    """Return the median seconds of one decode layer that finds and runs every expert it needs.

    `n_runs` is how many layers with experts a forward pass runs, one run again counted again.
    """
    with engine.unconfigured():
        decode_step_times(hf, engine, 4)
        steps = decode_step_times(hf, engine, n_steps)
    return float(np.median(steps)) / n_runs
