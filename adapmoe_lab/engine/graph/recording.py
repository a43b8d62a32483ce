"""Work on the device as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import triton

from adapmoe_lab.engine.graph.requirements import REMEDY, CaptureError

N_REHEARSALS = 2
"""Runs before the capture: kernels compile, and libraries set up their workspaces."""


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Run it again, on what its tensors hold now."""
        ...


def recorded(
    run: Callable[[], torch.Tensor], undo: Callable[[], object]
) -> tuple[Graph, torch.Tensor]:
    """Return work as a graph, and the tensor that every replay of it overwrites.

    Args:
        run: does the work once, from tensors that stay where they are.
        undo: puts back what it changed; called after every run but the captured one, which does
            nothing.

    Raises:
        CaptureError: it cannot be captured.
    """
    present = torch.cuda.current_stream()
    aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    aside.wait_stream(present)
    try:
        with torch.cuda.stream(aside):
            for _ in range(N_REHEARSALS):
                run()
                undo()
        present.wait_stream(aside)
        # a capture that fails leaves its own stream the current one
        with torch.cuda.stream(present), torch.cuda.graph(graph):
            result = run()
    except (CaptureError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, triton.TritonError) as error:
        raise CaptureError(
            "The forward of this model cannot be captured as a CUDA graph: "
            f"{_first_line(error)}. {REMEDY}"
        ) from error
    return graph, result


def _first_line(error: BaseException) -> str:
    """Return what went wrong in a line; ending an invalid capture is an error of its own."""
    texts = [str(cause).strip() for cause in (error.__context__, error) if cause is not None]
    said = next((text for text in texts if text), type(error).__name__)
    return said.splitlines()[0].rstrip(".")
