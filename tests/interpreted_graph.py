"""The graph executor's tests on a GPU, or without one: in Triton's interpreter.

There `TRITON_INTERPRET=1` must be set before triton is imported, so in a process of its own.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"

NEEDS_DEVICE = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (IS_INTERPRETED or torch.cuda.is_available()), reason="torch sees no CUDA device"
    ),
]
"""Marks of tests that run in both."""

ROWS_AT_ONCE = 256
"""Rows of a program: in the interpreter, programs take long and rows do not."""


def load_graph(name, dtype="bfloat16", executor="graph", **arguments):
    """Load a model under the graph executor, or `auto`."""
    from adapmoe_lab.engine.loading import load

    link = {"link": "none"} if IS_INTERPRETED else {}
    quiet = {"device": DEVICE, "dtype": dtype, "announce": lambda text: None, **link}
    return load(name, executor=executor, max_context_tokens=128, **quiet, **arguments)


@contextmanager
def capturing_on_the_cpu():
    """Let the graph executor run in the interpreter; yield the steps that were captured.

    A step that would be replayed is run again instead, its experts by the same kernels.
    """
    captured = []

    def recorded(step, n_before, run):
        def run_again():
            with step._capturing():
                step._logits = run()

        run_again()
        captured.append(step)
        return SimpleNamespace(replay=run_again)

    graph = "adapmoe_lab.engine.graph"
    with ExitStack() as patches:
        for target, instead in (
            ("adapmoe_lab.engine.loading.check_computing", lambda *_: None),
            (f"{graph}.executor.check_experts", lambda _: None),  # they are not pinned
            (f"{graph}.captured_step.CapturedStep._recorded", recorded),
            (f"{graph}.operators.ROWS_AT_ONCE", ROWS_AT_ONCE),
        ):
            patches.enter_context(patch(target, instead))
        yield captured


@contextmanager
def counting_captures():
    """Yield the steps that a GPU captured."""
    from adapmoe_lab.engine.graph.captured_step import CapturedStep

    captured, record = [], CapturedStep._recorded

    def counted(step, *arguments):
        captured.append(step)
        return record(step, *arguments)

    with patch.object(CapturedStep, "_recorded", counted):
        yield captured
