"""A button that hands a file from the kernel to the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget
import traitlets


class DownloadButton(anywidget.AnyWidget):
    """A button that saves `content` as `filename` in the browser's download folder.

    Attributes:
        filename: suggested name of the file.
        content: the bytes of the file; a string is stored as UTF-8.
        description: text of the button.
        disabled: whether the button is greyed out.
    """

    _esm = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")

    filename = traitlets.Unicode().tag(sync=True)
    content = traitlets.Bytes().tag(sync=True)
    description = traitlets.Unicode("Download").tag(sync=True)
    disabled = traitlets.Bool(False).tag(sync=True)

    def __init__(self, filename: str = "", content: bytes | str = b"", **traits: Any) -> None:
        """Offer `content` under a name; both may be replaced later."""
        super().__init__(filename=filename, content=encoded(content), **traits)

    def offer(self, filename: str, content: bytes | str) -> None:
        """Replace name and content together and enable the button."""
        with self.hold_sync():
            self.filename, self.content, self.disabled = filename, encoded(content), False


def encoded(content: bytes | str) -> bytes:
    """Return text as UTF-8, and bytes as they are."""
    return content.encode() if isinstance(content, str) else content
