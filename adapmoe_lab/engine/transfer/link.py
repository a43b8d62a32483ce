"""What experts travel over: a real bus with copy streams, or an emulated one with real copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from adapmoe_lab.engine.transfer.clock import Clock
from adapmoe_lab.engine.transfer.prefetch_copy import PrefetchCopy, PrefetchQueue

NO_LINK = "none"
"""The name of an emulated link without delay."""

MEASURED_BYTES, N_MEASURED = (2**18, 2**24), 4
"""Bytes of the copies, and how many of each, that a real link is measured by."""

Copies = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""Sources and their destinations; each is asked for when the copy before it was begun."""


class Link(Protocol):
    """Brings experts to the device: demands in order, and prefetches while there is none."""

    name: str

    def copy(self, source: torch.Tensor, destination: torch.Tensor) -> Any:
        """Begin a copy and return what `wait` needs to know it by.

        Everything computed so far may still read the destination's old contents.
        """
        ...

    def copy_all(self, copies: Copies) -> Any:
        """Begin copies, each of a source to its destination; return what to wait for all by."""
        ...

    def wait(self, arrival: Any) -> None:
        """Make what is computed next see the whole copy."""
        ...

    def issue_prefetch(
        self, source: torch.Tensor, destination: torch.Tensor, priority: int
    ) -> PrefetchCopy:
        """Issue a copy whose chunks begin, by priority, while nothing is demanded."""
        ...

    def begin_chunks(self) -> None:
        """Begin every chunk whose time has come, where that is known only afterwards."""
        ...

    def expect_quiet(self, until: float) -> None:
        """Expect that nothing is demanded until then: begin now what must be begun beforehand."""
        ...

    def finish(self, copy: PrefetchCopy) -> None:
        """Demand what is left of a prefetch."""
        ...

    def cancel(self, copy: PrefetchCopy) -> None:
        """Begin no further chunk of a copy."""
        ...

    def seconds(self, n_bytes: int) -> float:
        """Return how long a copy of that size is expected to take."""
        ...

    def free_at(self) -> float:
        """Return when all copies begun are expected to be done, on the clock."""
        ...

    def drain(self) -> None:
        """Forget the prefetches and return once no copy is under way.

        Its memory may then be given up.
        """
        ...

    def without_link_delay(self) -> AbstractContextManager[None]:
        """Return a context in which copies take no emulated time."""
        ...


class EmulatedLink:
    """Real copies in host memory, each throttled to what the target link would take.

    The transfers queue on one link: a copy starts when it is issued and the one before it has
    ended, and computing goes on meanwhile.
    """

    def __init__(
        self, name: str, clock: Clock, bytes_per_s: float = float("inf"), latency_s: float = 0.0
    ) -> None:
        """Emulate a link of the given bandwidth and latency; infinite and zero delay nothing."""
        self.clock = clock
        self.emulate(name, bytes_per_s, latency_s)
        self._prefetches = PrefetchQueue()
        self._is_delayed = True

    def emulate(self, name: str, bytes_per_s: float = float("inf"), latency_s: float = 0.0) -> None:
        """Be another link from now on, with nothing on its way."""
        self.name = name
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self._free_at = self.clock.now()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Be the present link again afterwards, whatever was emulated meanwhile."""
        present = self.name, self.bytes_per_s, self.latency_s
        try:
            yield
        finally:
            self.emulate(*present)

    def copy(self, source: torch.Tensor, destination: torch.Tensor) -> float:
        """Copy now and return when it counts as arrived."""
        self.begin_chunks()
        return self._copy(self.clock.now(), source, destination)

    def copy_all(self, copies: Copies) -> float:
        """Copy one after the other and return when the last counts as arrived."""
        return [self.copy(*pair) for pair in copies][-1]

    def _copy(self, issued_at: float, source: torch.Tensor, destination: torch.Tensor) -> float:
        destination.copy_(source)
        begins = max(issued_at, self._free_at)
        self._free_at = begins + self.seconds(source.numel() * source.element_size())
        return self._free_at

    def issue_prefetch(
        self, source: torch.Tensor, destination: torch.Tensor, priority: int
    ) -> PrefetchCopy:
        """Issue a copy that uses the link's idle time."""
        copy = PrefetchCopy(source, destination, priority, self.clock.now())
        self._prefetches.add(copy)
        return copy

    def begin_chunks(self) -> None:
        """Copy every chunk that the target link would have begun before now."""
        now = self.clock.now()
        while (copy := self._prefetches.next()) and max(self._free_at, copy.issued_at) < now:
            copy.arrival = self._copy(copy.issued_at, *copy.take_chunk())

    def expect_quiet(self, until: float) -> None:
        """Begin nothing: when it is over, `begin_chunks` knows how long it was quiet."""

    def finish(self, copy: PrefetchCopy) -> None:
        """Copy what is left now."""
        self.begin_chunks()
        if not copy.is_whole:
            copy.arrival = self._copy(self.clock.now(), *copy.take_rest())

    def cancel(self, copy: PrefetchCopy) -> None:
        """Begin no further chunk of a copy."""
        self._prefetches.remove(copy)

    def seconds(self, n_bytes: int) -> float:
        """Return how long the target link takes for a copy of that size."""
        return self.latency_s + n_bytes / self.bytes_per_s if self._is_delayed else 0.0

    def free_at(self) -> float:
        """Return when all copies begun are done."""
        return self._free_at

    def wait(self, arrival: float) -> None:
        """Hold until the copy counts as arrived."""
        self.clock.sleep_until(arrival)

    def drain(self) -> None:
        """Forget the prefetches; other copies are made at once."""
        self._prefetches.clear()

    @contextmanager
    def without_link_delay(self) -> Iterator[None]:
        """Copy without delay, for runs whose time does not matter."""
        previous, self._is_delayed = self._is_delayed, False
        try:
            yield
        finally:
            self._is_delayed = previous


class CudaLink:
    """Pinned memory to device memory over a copy stream of its own."""

    name = "pcie"

    def __init__(self, device: torch.device, clock: Clock) -> None:
        """Open the copy stream."""
        self.device = device
        self.clock = clock
        self.stream = torch.cuda.Stream(device)
        self._prefetches = PrefetchQueue()
        self._free_at = 0.0
        self._measured: tuple[float, float] | None = None

    def copy(self, source: torch.Tensor, destination: torch.Tensor) -> torch.cuda.Event:
        """Enqueue the copy behind everything already computed, which may read the destination."""
        return self.copy_all([(source, destination)])

    def copy_all(self, copies: Copies) -> torch.cuda.Event:
        """Enqueue copies likewise, one after the other."""
        return self._enqueue(self._expected(copies), self._computed_so_far())

    def _expected(self, copies: Copies) -> Copies:
        """Yield copies, each counted on; when the link is free matters only to prefetch."""
        for source, destination in copies:
            if self._measured is not None:
                self._expect(source)
            yield source, destination

    def _expect(self, source: torch.Tensor) -> None:
        """Count on a copy of that size behind all that was begun."""
        begins = max(self.clock.now(), self.free_at())
        self._free_at = begins + self.seconds(source.numel() * source.element_size())

    def _computed_so_far(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def _enqueue(self, copies: Copies, ready: torch.cuda.Event) -> torch.cuda.Event:
        self.stream.wait_event(ready)
        with torch.cuda.stream(self.stream):
            for source, destination in copies:
                destination.copy_(source, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self.stream)
        return arrived

    def wait(self, arrival: torch.cuda.Event) -> None:
        """Make the compute stream wait for the copy; the host goes on."""
        torch.cuda.current_stream(self.device).wait_event(arrival)

    def issue_prefetch(
        self, source: torch.Tensor, destination: torch.Tensor, priority: int
    ) -> PrefetchCopy:
        """Issue a copy; `expect_quiet` begins its chunks."""
        copy = PrefetchCopy(source, destination, priority, self.clock.now())
        copy.ready = self._computed_so_far()
        self._prefetches.add(copy)
        return copy

    def begin_chunks(self) -> None:
        """Begin nothing: what comes next may be a demand, which would wait for it."""

    def expect_quiet(self, until: float) -> None:
        """Enqueue every chunk that will begin by then, behind what is demanded.

        A copy stream serves in order, so what is enqueued cannot be cancelled. If the expectation
        holds, the next demand waits for one chunk at most.
        """
        while max(self.clock.now(), self.free_at()) < until and (copy := self._prefetches.next()):
            source, destination = copy.take_chunk()
            self._expect(source)
            copy.arrival = self._enqueue([(source, destination)], copy.ready)

    def finish(self, copy: PrefetchCopy) -> None:
        """Enqueue what is left."""
        if not copy.is_whole:
            copy.arrival = self.copy(*copy.take_rest())

    def cancel(self, copy: PrefetchCopy) -> None:
        """Begin no further chunk of a copy."""
        self._prefetches.remove(copy)

    def seconds(self, n_bytes: int) -> float:
        """Return how long a copy takes, as measured when this is first called."""
        if self._measured is None:
            self._measured = self._measured_costs()
        latency_s, bytes_per_s = self._measured
        return latency_s + n_bytes / bytes_per_s

    def free_at(self) -> float:
        """Return when all copies begun are expected to be done; at the latest now, if they are."""
        if self.stream.query():
            self._free_at = min(self._free_at, self.clock.now())
        return self._free_at

    def _measured_costs(self) -> tuple[float, float]:
        """Return latency in seconds and bytes per second, from pinned copies of two sizes."""
        spent = []
        for n_bytes in MEASURED_BYTES:
            source = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
            target = torch.empty(n_bytes, dtype=torch.uint8, device=self.device)
            seconds = []
            for _ in range(N_MEASURED):
                self.stream.synchronize()
                begin = self.clock.now()
                self._enqueue([(source, target)], self._computed_so_far()).synchronize()
                seconds.append(self.clock.now() - begin)
            spent.append(min(seconds))
        bytes_per_s = (MEASURED_BYTES[1] - MEASURED_BYTES[0]) / max(spent[1] - spent[0], 1e-9)
        return max(0.0, spent[0] - MEASURED_BYTES[0] / bytes_per_s), bytes_per_s

    def drain(self) -> None:
        """Forget the prefetches and wait on the host for the copy stream."""
        self._prefetches.clear()
        self.stream.synchronize()

    @contextmanager
    def without_link_delay(self) -> Iterator[None]:
        """Change nothing: a real link emulates no delay."""
        yield
