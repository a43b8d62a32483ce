"""Times of a machine's single parts: copies, experts, memory, launches, each alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import nn

from adapmoe_lab.engine.store.expert_buffer import expert_views
from adapmoe_lab.engine.store.expert_store import ExpertStore
from adapmoe_lab.engine.transfer.clock import Clock, RealClock
from adapmoe_lab.engine.transfer.link import Link
from adapmoe_lab.models.experts import run_expert
from adapmoe_lab.records import ExpertFormat

Work = Callable[[], float]
"""Does something once and returns the seconds that took, or one of several alike."""

MAX_ROUNDS, LEAST_ROUNDS = 12, 1
BUDGET_S = 2.0
COPY_FRACTIONS = (1 / 64, 0.125, 0.25, 0.5, 1.0)
PRECISIONS = ("bfloat16", "int8", "int4")
"""Measured whatever the model is stored in."""

COLD_BYTES, MOST_ROWS = 2**26, 64
"""Experts are run in rotation over so many bytes that none is in a cache when it comes again."""

HOST_BYTES = 2**26
N_LAUNCHES = 64


def interleaved_medians(works: Mapping[str, Work], budget_s: float = BUDGET_S) -> dict[str, float]:
    """Return the median seconds of each work, interleaved so that drift affects all alike.

    The first round warms up. Rounds end after `MAX_ROUNDS`, or when the budget is spent and
    `LEAST_ROUNDS` are kept.
    """
    samples: dict[str, list[float]] = {name: [] for name in works}
    end = time.perf_counter() + budget_s
    for round_number in range(MAX_ROUNDS + 1):
        for name, work in works.items():
            samples[name].append(work())
        if round_number >= LEAST_ROUNDS and time.perf_counter() > end:
            break
    return {name: float(np.median(kept[1:])) for name, kept in samples.items()}


def seconds_each(
    works: Sequence[Callable[[], object]], device: torch.device, clock: Clock | None = None
) -> float:
    """Return the seconds that each of several works takes, one after the other, all waited for.

    On the machine's own clock, if no other is given.
    """
    clock = clock if clock is not None else RealClock()
    synchronise(device)
    start = clock.now()
    for work in works:
        work()
    synchronise(device)
    return (clock.now() - start) / len(works)


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, eq=False)
class CopyTimes:
    """Median seconds of waited-for copies, by size in bytes; pageable ones where there is CUDA."""

    sizes: list[int]
    linked: list[float]
    pageable: list[float] | None


def copy_times(store: ExpertStore, link: Link, clock: Clock, device: torch.device) -> CopyTimes:
    """Time copies of parts of the widest experts, over the link and from pageable memory."""
    n_bytes = int(store.expert_bytes.max())
    widest = np.argwhere(store.expert_bytes == n_bytes)[: store.n_experts(0)].tolist()
    sizes = sorted({max(1, int(n_bytes * fraction)) for fraction in COPY_FRACTIONS})
    target = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    pageable = torch.zeros(n_bytes, dtype=torch.uint8)
    copied = count()

    def over_link(size: int) -> float:
        source = store.buffer(*widest[next(copied) % len(widest)])[:size]
        return seconds_each([lambda: link.wait(link.copy(source, target[:size]))], device, clock)

    def from_pageable(size: int) -> float:
        return seconds_each([lambda: target[:size].copy_(pageable[:size])], device)

    works: dict[str, Work] = {f"link {size}": lambda size=size: over_link(size) for size in sizes}
    has_pageable = device.type == "cuda"
    if has_pageable:
        works |= {f"pageable {size}": lambda size=size: from_pageable(size) for size in sizes}
    medians = interleaved_medians(works)
    return CopyTimes(
        sizes,
        [medians[f"link {size}"] for size in sizes],
        [medians[f"pageable {size}"] for size in sizes] if has_pageable else None,
    )


@torch.no_grad()
def expert_times(
    module: nn.Module, stored: Sequence[ExpertFormat], hidden: torch.Tensor
) -> dict[str, float]:
    """Return the median seconds of one expert for hidden states, by precision.

    Experts of zeros in the shape of the model's, in every precision that is stored here and in
    `PRECISIONS`, each read from memory and not from a cache.

    Args:
        module: the transformers experts module.
        stored: layouts in the precisions of the model's store.
        hidden: [n, D], what they are run on.
    """
    layouts = {layout.precision: layout for layout in stored}
    for precision in PRECISIONS:
        layouts.setdefault(precision, _in_precision(stored[0], precision, hidden.dtype))

    def running(layout: ExpertFormat) -> Work:
        n_rows = min(MOST_ROWS, -(-COLD_BYTES // layout.n_bytes))
        rows = torch.empty((n_rows, layout.n_bytes), dtype=torch.uint8, device=hidden.device)
        experts = [expert_views(row, layout) for row in rows.zero_()]
        n_calls, rounds = min(n_rows, 8), count()

        def work() -> float:
            first = next(rounds) * n_calls
            chosen = [experts[(first + i) % n_rows] for i in range(n_calls)]
            runs = [
                lambda weights=weights: run_expert(module, weights, hidden) for weights in chosen
            ]
            return seconds_each(runs, hidden.device)

        return work

    return interleaved_medians({name: running(layout) for name, layout in layouts.items()})


def _in_precision(layout: ExpertFormat, precision: str, dtype: torch.dtype) -> ExpertFormat:
    """Lay an expert out anew, in another precision."""
    shapes = {field.name: field.shape for field in layout.fields}
    transposed = any(field.transposed for field in layout.fields)
    return ExpertFormat.of(shapes, precision, str(dtype).removeprefix("torch."), transposed)


@torch.no_grad()
def host_rates(dtype: torch.dtype) -> tuple[float, float]:
    """Return bytes per second of a large copy in host memory and of a matrix-vector product.

    A copied byte counts twice, read and written. The product is of weights in `dtype`, by as many
    threads as torch uses.
    """
    host = torch.device("cpu")
    source = torch.empty(HOST_BYTES, dtype=torch.uint8).zero_()
    target = torch.empty_like(source).zero_()
    width = 4096
    matrix = source.view(dtype).view(-1, width)
    vector = torch.ones(1, width, dtype=dtype)
    medians = interleaved_medians(
        {
            "copy": lambda: seconds_each([lambda: target.copy_(source)], host),
            "product": lambda: seconds_each([lambda: nn.functional.linear(vector, matrix)], host),
        },
        budget_s=1.0,
    )
    return 2 * HOST_BYTES / medians["copy"], HOST_BYTES / medians["product"]


def sync_and_launch_s(device: torch.device) -> tuple[float, float]:
    """Return the host's seconds to find a CUDA device idle, and to launch a kernel on it."""
    one = torch.zeros(1, device=device)

    def launch() -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(N_LAUNCHES):
            one.add_(1)
        return (time.perf_counter() - start) / N_LAUNCHES

    def wait() -> float:
        one.add_(1)
        synchronise(device)
        return seconds_each([lambda: synchronise(device)], device) / 2  # it ends with another

    medians = interleaved_medians({"sync": wait, "launch": launch}, budget_s=0.2)
    return medians["sync"], medians["launch"]
