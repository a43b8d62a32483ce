"""A bar for work on many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

BAR_DELAY_S = 1.0
"""A bar appears only if there is something to wait for.

It is text in notebooks too: there tqdm's own would leave eleven widgets behind with every model.
"""


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
