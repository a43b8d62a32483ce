"""Work that may lag behind a control, but always ends with its newest value."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LatestWins(Generic[Value]):
    """One worker thread that computes the newest submitted value and drops those it overtook."""

    def __init__(
        self, work: Callable[[Value], object], on_error: Callable[[Exception], object]
    ) -> None:
        """Start the worker.

        Args:
            work: what to do with a value; runs in the worker thread.
            on_error: receives what `work` raised, in the worker thread.
        """
        self._work = work
        self._on_error = on_error
        self._pending: list[Value] = []
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True, name="latest-wins")
        self._thread.start()

    def submit(self, value: Value) -> None:
        """Ask for `value` to be computed, in place of any that still waits; never blocks."""
        with self._changed:
            self._pending = [value]
            self._changed.notify_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is pending or being computed; return False if time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._pending or self._busy), timeout_s)

    def close(self) -> None:
        """End the worker after the value it is computing; what waits is dropped."""
        with self._changed:
            self._closed = True
            self._pending = []
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._pending or self._closed)
                if self._closed:
                    self._pending = []
                    return
                value = self._pending.pop()
                self._busy = True
            try:
                self._work(value)
            except Exception as error:
                self._on_error(error)
