"""Who is called back about what a layer's experts did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from adapmoe_lab.models.hooks.observing import OF_EXPERTS, Callback
from adapmoe_lab.records.hook_points import HookPoint


class Observers:
    """Callbacks at the hook points that lie inside a layer's experts."""

    def __init__(self) -> None:
        """Begin with none."""
        self._callbacks: dict[HookPoint, list[Callback]] = {point: [] for point in OF_EXPERTS}

    def at(self, point: HookPoint) -> tuple[Callback, ...]:
        """Return those of a hook point, in the order they were added."""
        return tuple(self._callbacks[point])

    @contextmanager
    def adding(self, callbacks: Mapping[HookPoint, Callback]) -> Iterator[None]:
        """Call these back too inside the block."""
        lists = [(self._callbacks[point], callback) for point, callback in callbacks.items()]
        for registered, callback in lists:
            registered.append(callback)
        try:
            yield
        finally:
            for registered, callback in lists:
                registered.remove(callback)
