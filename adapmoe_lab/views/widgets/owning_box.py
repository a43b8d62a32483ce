"""A box of widgets that are given back together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ipywidgets


class OwningBox(ipywidgets.VBox):
    """A column that closes with everything in it: children, their children, layouts and styles.

    ipywidgets keeps every open widget, and a box that closes leaves what it holds open.
    """

    def close(self) -> None:
        """Close the box and all widgets reached from it; closed ones stay closed."""
        held = widgets_within(self)
        super().close()
        for widget in held:
            widget.close()


def widgets_within(box: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    """Return every other widget that is reached through what a widget sends to the page."""
    found: dict[int, ipywidgets.Widget] = {id(box): box}
    waiting = [box]
    while waiting:
        widget = waiting.pop()
        for value in (getattr(widget, name, None) for name in widget.keys):
            for inner in _widgets_in(value):
                if id(inner) not in found:
                    found[id(inner)] = inner
                    waiting.append(inner)
    return [widget for widget in found.values() if widget is not box]


def _widgets_in(value: Any) -> Iterator[ipywidgets.Widget]:
    """Yield the widgets in the value of a trait, which may be a sequence or mapping of them."""
    if isinstance(value, ipywidgets.Widget):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _widgets_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _widgets_in(part)
