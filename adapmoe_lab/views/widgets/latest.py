"""Work that may lag behind a control, but always ends with its newest value."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LatestWins(Generic[Value]):
    """Computes the newest submitted value in a thread and drops those it overtook.

    The thread ends when there is nothing to compute, so that nothing keeps what is idle alive.
    """

    def __init__(
        self, work: Callable[[Value], object], on_error: Callable[[Exception], object]
    ) -> None:
        """Begin idle.

        Args:
            work: what to do with a value; runs in a thread of its own, one value at a time.
            on_error: receives what `work` raised, in that thread.
        """
        self._work = work
        self._on_error = on_error
        self._pending: list[Value] = []
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()

    def submit(self, value: Value) -> None:
        """Ask for `value` to be computed, in place of any that still waits; never blocks.

        Does nothing after `close`.
        """
        with self._changed:
            if self._closed:
                return
            self._pending = [value]
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._run, daemon=True, name="latest-wins").start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is pending or being computed; return False if time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, timeout_s)

    def close(self) -> None:
        """Compute nothing after the present value; what waits is dropped."""
        with self._changed:
            self._closed = True
            self._pending = []

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._pending:
                    self._busy = False
                    self._changed.notify_all()
                    return
                value = self._pending.pop()
            try:
                self._work(value)
            except Exception as error:
                self._on_error(error)
