"""The graph executor's tests on a GPU, or without one: in Triton's interpreter.

There `TRITON_INTERPRET=1` must be set before triton is imported, so in a process of its own.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from importlib import import_module
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


GRAPH = "adapmoe_lab.engine.graph"
ROWS_AT_ONCE = 256
"""Rows of a program: in the interpreter, programs take long and rows do not."""


def load_graph(name, dtype="bfloat16", executor="graph", **arguments):
    """Load a model under the graph executor, or `auto`."""
    from adapmoe_lab.engine.loading import load

    link = {"link": "none"} if IS_INTERPRETED else {}
    quiet = {"device": DEVICE, "dtype": dtype, "announce": lambda text: None, **link}
    return load(name, executor=executor, max_context_tokens=128, **quiet, **arguments)


def rerun(run, undo):
    """Return a graph that runs again what it would replay, as `recording.recorded` does."""
    result = run()
    undo()
    return SimpleNamespace(replay=lambda: result.copy_(run())), result


def check_as_if_pinned(store):
    """Refuse what a GPU would refuse of experts, but for where they lie."""
    from adapmoe_lab.engine.graph.requirements import check_experts

    pinned = SimpleNamespace(is_pinned=lambda: True)
    check_experts(SimpleNamespace(formats=store.formats, buffer=lambda *_: pinned))


@contextmanager
def capturing_on_the_cpu():
    """Let the graph executor run in the interpreter; yield what was captured of steps.

    A step that would be replayed is run again instead, its experts by the same kernels.
    """
    with ExitStack() as patches:
        for target, instead in (
            ("adapmoe_lab.engine.loading.check_computing", lambda *_: None),
            (f"{GRAPH}.executor.check_experts", check_as_if_pinned),
            (f"{GRAPH}.captured_step.recorded", rerun),
            (f"{GRAPH}.captured_choice.recorded", rerun),
            (f"{GRAPH}.operators.ROWS_AT_ONCE", ROWS_AT_ONCE),
        ):
            patches.enter_context(patch(target, instead))
        yield patches.enter_context(counting_captures())


def counting_steps():
    """Count captures: yield those of a GPU, or the interpreter's in their place."""
    return capturing_on_the_cpu() if IS_INTERPRETED else counting_captures()


@contextmanager
def counting_captures(of="captured_step"):
    """Yield what is captured of steps, or of choices, one element for each."""
    module = import_module(f"{GRAPH}.{of}")
    captured, record = [], module.recorded

    def counted(run, undo):
        captured.append(run)
        return record(run, undo)

    with patch.object(module, "recorded", counted):
        yield captured
