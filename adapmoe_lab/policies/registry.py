"""What is known by a name: policies of one kind, and how another is added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Entries by name, in the order they were registered. Only `add` and `remove` change it."""

    def __init__(self, kind: str, argument: str) -> None:
        """Start empty.

        Args:
            kind: what an error calls an entry, such as "eviction policy".
            argument: what users name an entry by, such as "eviction".
        """
        self._kind, self._argument = kind, argument
        self._entries: dict[str, Entry] = {}

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def named(self, name: str) -> Entry:
        """Return an entry.

        Raises:
            ValueError: there is none of this name; the text lists those there are.
        """
        if name not in self._entries:
            known = ", ".join(self._entries)
            raise ValueError(f"{self._argument}={name!r} is unknown; expected one of {known}.")
        return self._entries[name]

    def add(self, name: str, entry: Entry) -> None:
        """Register an entry; the same one twice is no error.

        Raises:
            ValueError: another entry has this name.
        """
        if self._entries.setdefault(name, entry) != entry:
            raise ValueError(
                f"Another {self._kind} is called {name!r}. Give this one a name of its own, or "
                f"unregister({name!r}) that one first."
            )

    def remove(self, name: str) -> None:
        """Forget an entry.

        Raises:
            ValueError: there is none of this name.
        """
        self.named(name)
        del self._entries[name]
