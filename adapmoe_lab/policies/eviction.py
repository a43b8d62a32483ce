"""Which resident expert leaves first when room is needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Protocol


class EvictionPolicy(Protocol):
    """The order in which one layer's experts leave. It decides; it moves nothing."""

    def used(self, expert: int) -> None:
        """Note that a resident expert was used."""

    def removed(self, expert: int) -> None:
        """Note that an expert left the device."""

    def leaving_order(self, candidates: Collection[int]) -> list[int]:
        """Return the candidates, the first to leave first."""
        ...


class LRU:
    """Least recently used leaves first."""

    def __init__(self) -> None:
        """Start with nothing used."""
        self._by_recency: OrderedDict[int, None] = OrderedDict()

    def used(self, expert: int) -> None:
        """Make the expert the most recently used."""
        self._by_recency[expert] = None
        self._by_recency.move_to_end(expert)

    def removed(self, expert: int) -> None:
        """Forget the expert."""
        self._by_recency.pop(expert, None)

    def leaving_order(self, candidates: Collection[int]) -> list[int]:
        """Return the candidates, least recently used first."""
        return [expert for expert in self._by_recency if expert in candidates]


POLICIES: dict[str, type[EvictionPolicy]] = {"lru": LRU}
"""Eviction policies by the name a config gives them."""
