"""A plotly figure that is replaced in place, and whose program travels once per page."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import anywidget
import plotly.graph_objects as go
import traitlets
from plotly.offline import get_plotlyjs

_FILES = Path(__file__)


class PlotlyProgram(anywidget.AnyWidget):
    """Plotly's 5 MB of JavaScript, held for every live figure of a page; shows nothing."""

    _esm = "export default { render() {} }"
    _kept: ClassVar[PlotlyProgram | None] = None

    source = traitlets.Unicode().tag(sync=True)

    @classmethod
    def of_kernel(cls) -> PlotlyProgram:
        """Return the one of this kernel; it is sent when first asked for, or once closed."""
        if cls._kept is None or cls._kept.comm is None:
            cls._kept = cls(source=get_plotlyjs())
        return cls._kept


class LiveFigure(anywidget.AnyWidget):
    """A figure on the page that `show` turns into another one without flicker.

    Ten live figures send plotly once; ten `FigureWidget`s send it ten times.

    Attributes:
        figure: what is shown.
    """

    _esm = _FILES.with_suffix(".js")
    _css = _FILES.with_suffix(".css")

    _program = traitlets.Unicode().tag(sync=True)
    _content = traitlets.Unicode().tag(sync=True)

    def __init__(self, figure: go.Figure | None = None, **traits: Any) -> None:
        """Start with a figure, or empty."""
        self.figure = go.Figure() if figure is None else figure
        super().__init__(
            _program=PlotlyProgram.of_kernel().model_id,
            _content=self.figure.to_json(validate=False),
            **traits,
        )

    def show(self, figure: go.Figure) -> None:
        """Replace data and layout in one message; plotly redraws what differs."""
        self.figure = figure
        self._content = figure.to_json(validate=False)
