"""Controls for notebooks: anywidget and ipywidgets, no logic of the domain, no network."""

from adapmoe_lab.views.widgets.download import DownloadButton
from adapmoe_lab.views.widgets.job import Cancelled, Job
from adapmoe_lab.views.widgets.latest import LatestWins
from adapmoe_lab.views.widgets.live_figure import LiveFigure
from adapmoe_lab.views.widgets.owning_box import OwningBox
from adapmoe_lab.views.widgets.threshold_curve import ThresholdCurve

__all__ = [
    "Cancelled",
    "DownloadButton",
    "Job",
    "LatestWins",
    "LiveFigure",
    "OwningBox",
    "ThresholdCurve",
]
