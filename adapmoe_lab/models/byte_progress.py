"""A bar for work on many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

BAR_DELAY_S = 1.0
"""A bar appears only if there is something to wait for."""


@contextmanager
def byte_progress(label: str, n_bytes: int) -> Iterator[Callable[[int], object]]:
    """Show how much of `n_bytes` is done; the block calls what it is given with what is added."""
    bar = tqdm(
        desc=label,
        total=n_bytes,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        delay=BAR_DELAY_S,
    )
    with bar:
        yield bar.update
