"""What experts travel over: a real bus with copy streams, or an emulated one with real copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from adapmoe_lab.engine.clock import Clock


class Link(Protocol):
    """Brings experts to the device, in the order they were asked for."""

    name: str

    def copy(self, source: torch.Tensor, destination: torch.Tensor) -> Any:
        """Begin a copy and return what `wait` needs to know it by.

        Everything computed so far may still read the destination's old contents.
        """
        ...

    def wait(self, arrival: Any) -> None:
        """Make what is computed next see the whole copy."""
        ...

    def drain(self) -> None:
        """Return once no copy is under way, so that its memory may be given up."""
        ...

    def unpaced(self) -> AbstractContextManager[None]:
        """Return a context in which copies take no emulated time."""
        ...


class EmulatedLink:
    """Real copies in host memory, each held as long as the target link would take.

    The transfers queue on one link: a copy starts when it is asked for and the one before it has
    ended, and computing goes on meanwhile.
    """

    def __init__(
        self, name: str, clock: Clock, bytes_per_s: float = float("inf"), latency_s: float = 0.0
    ) -> None:
        """Emulate a link of the given bandwidth and latency; infinite and zero hold nothing."""
        self.name = name
        self.clock = clock
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self._free_at = clock.now()
        self._is_paced = True

    def copy(self, source: torch.Tensor, destination: torch.Tensor) -> float:
        """Copy now and return the moment it counts as arrived."""
        start = max(self.clock.now(), self._free_at)
        destination.copy_(source)
        if self._is_paced:
            n_bytes = source.numel() * source.element_size()
            start += self.latency_s + n_bytes / self.bytes_per_s
        self._free_at = start
        return start

    def wait(self, arrival: float) -> None:
        """Hold until the copy counts as arrived."""
        self.clock.sleep_until(arrival)

    def drain(self) -> None:
        """Do nothing: copies are made at once, only their arrival is held back."""

    @contextmanager
    def unpaced(self) -> Iterator[None]:
        """Copy without holding, for runs whose time does not matter."""
        previous, self._is_paced = self._is_paced, False
        try:
            yield
        finally:
            self._is_paced = previous


class CudaLink:
    """Pinned memory to device memory over a copy stream of its own."""

    name = "pcie"

    def __init__(self, device: torch.device) -> None:
        """Open the copy stream."""
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def copy(self, source: torch.Tensor, destination: torch.Tensor) -> torch.cuda.Event:
        """Enqueue the copy behind everything already computed, which may read the destination."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            destination.copy_(source, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self.stream)
        return arrived

    def wait(self, arrival: torch.cuda.Event) -> None:
        """Make the compute stream wait for the copy; the host goes on."""
        torch.cuda.current_stream(self.device).wait_event(arrival)

    def drain(self) -> None:
        """Wait on the host for the copy stream."""
        self.stream.synchronize()

    @contextmanager
    def unpaced(self) -> Iterator[None]:
        """Change nothing: a real link has no emulated pace."""
        yield
