"""Prefetches on the link: copies begun chunk by chunk while nothing is demanded, or cancelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from adapmoe_lab.records.step_costs import N_CHUNKS, chunk_bounds


@dataclass(eq=False)
class PrefetchCopy:
    """An expert on its way to the buffer, or waiting for the link.

    Attributes:
        source: its buffer in the store.
        destination: where it goes.
        priority: the copy with the lowest goes first.
        issued_at: when it was issued.
        n_begun: chunks begun so far.
        arrival: what `Link.wait` needs to know the last chunk begun by; None before the first.
        ready: on a GPU, the event after which nothing reads the destination's old contents.
    """

    source: torch.Tensor
    destination: torch.Tensor
    priority: int
    issued_at: float
    n_begun: int = 0
    arrival: Any = None
    ready: Any = None

    @property
    def is_whole(self) -> bool:
        """Whether every chunk was begun."""
        return self.n_begun == N_CHUNKS

    @property
    def bytes_begun(self) -> int:
        """Bytes of the chunks begun."""
        return chunk_bounds(self.source.numel())[self.n_begun]

    @property
    def bytes_left(self) -> int:
        """Bytes of the others."""
        return self.source.numel() - self.bytes_begun

    def take_chunk(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return source and destination of the next chunk, which is begun now."""
        first, end = chunk_bounds(self.source.numel())[self.n_begun : self.n_begun + 2]
        self.n_begun += 1
        return self.source[first:end], self.destination[first:end]

    def take_rest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return source and destination of all that is left, which is begun now."""
        first = self.bytes_begun
        self.n_begun = N_CHUNKS
        return self.source[first:], self.destination[first:]


class PrefetchQueue:
    """Copies that wait for the link, in the order their next chunks go."""

    def __init__(self) -> None:
        """Start empty."""
        self._copies: list[PrefetchCopy] = []

    def add(self, copy: PrefetchCopy) -> None:
        """Let a copy wait behind those of its priority."""
        self._copies.append(copy)

    def remove(self, copy: PrefetchCopy) -> None:
        """Begin no further chunk of a copy."""
        if copy in self._copies:
            self._copies.remove(copy)

    def clear(self) -> None:
        """Begin no further chunk of any copy."""
        self._copies.clear()

    def next(self) -> PrefetchCopy | None:
        """Return the copy whose next chunk goes first: by priority, then by age."""
        self._copies = [copy for copy in self._copies if not copy.is_whole]
        return min(self._copies, key=lambda copy: copy.priority, default=None)
