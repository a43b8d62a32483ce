"""A plotly figure that is replaced in place, and whose program travels once per page."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, ClassVar

import anywidget
import plotly.graph_objects as go
import traitlets
from plotly.offline import get_plotlyjs

_FILES = Path(__file__)


class PlotlyProgram(anywidget.AnyWidget):
    """Plotly's 5 MB of JavaScript, held for every live figure of a page; shows nothing.

    It is closed with the last figure that is open.
    """

    _esm = "export default { render() {} }"
    _kept: ClassVar[PlotlyProgram | None] = None
    _n_figures: ClassVar[int] = 0
    _counting: ClassVar = threading.RLock()  # a figure may be closed while one opens

    source = traitlets.Unicode().tag(sync=True)

    @classmethod
    def taken(cls) -> PlotlyProgram:
        """Return the one of this kernel for a figure that opens; it is sent to the first."""
        with cls._counting:
            cls._n_figures += 1
            if cls._kept is None or cls._kept.comm is None:
                cls._kept = cls(source=get_plotlyjs())
            return cls._kept

    @classmethod
    def given_back(cls) -> None:
        """Count a figure that closes."""
        with cls._counting:
            cls._n_figures -= 1
            if not cls._n_figures and cls._kept is not None:
                cls._kept.close()
                cls._kept.layout.close()
                cls._kept = None


class LiveFigure(anywidget.AnyWidget):
    """A figure on the page that `show` turns into another one without flicker.

    Ten live figures send plotly once; ten `FigureWidget`s send it ten times.

    Attributes:
        figure: what is shown.
    """

    _esm = _FILES.with_suffix(".js").read_text(encoding="utf-8")
    _css = _FILES.with_suffix(".css").read_text(encoding="utf-8")

    _program = traitlets.Unicode().tag(sync=True)
    _content = traitlets.Unicode().tag(sync=True)

    def __init__(self, figure: go.Figure | None = None, **traits: Any) -> None:
        """Start with a figure, or empty."""
        self.figure = go.Figure() if figure is None else figure
        super().__init__(
            _program=PlotlyProgram.taken().model_id,
            _content=self.figure.to_json(validate=False),
            **traits,
        )

    def show(self, figure: go.Figure) -> None:
        """Replace data and layout in one message; plotly redraws what differs."""
        self.figure = figure
        self._content = figure.to_json(validate=False)

    def close(self) -> None:
        """Close the figure and its layout, and plotly with the last one."""
        if self.comm is not None:
            PlotlyProgram.given_back()
        super().close()
        self.layout.close()
