"""The workbench as a user holds it: made for a model, closed with everything in it."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

from IPython.core.getipython import get_ipython

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.loss import token_sequences
from adapmoe_lab.evaluation.texts import Texts, as_texts, calibration_split, calibration_texts
from adapmoe_lab.profiling.hardware.probe import check_probed, probe_hardware
from adapmoe_lab.profiling.routing.profile import profile
from adapmoe_lab.profiling.sensitivity.sensitivity import sensitivity as measure_sensitivity
from adapmoe_lab.records import (
    HardwareProfile,
    RoutingTrace,
    SensitivityProfile,
    Surrogates,
    TunedConfig,
)
from adapmoe_lab.tuning.tune import check_skippable
from adapmoe_lab.workbench.measuring import MAX_LOSS_TOKENS, Measuring
from adapmoe_lab.workbench.session import Session
from adapmoe_lab.workbench.widgets import Panel

CLOSED = "This workbench is closed; make a new one with lab.Workbench(model)."


class Workbench:
    """The interactive panel: tune thresholds and cache, predict, measure, export.

    It opens with half of the experts kept and the most skipped that is predicted to cost at most
    one percent of perplexity. What `Panel` has is reached through it.

    The panel is closed, with its widgets and threads, and lets the model go: by its Close button,
    by `close`, when the cell that made it runs again, and when nothing holds the workbench any
    more. So keep it in a variable, or let it be the last value of a cell.
    """

    _open: ClassVar[weakref.WeakSet[Workbench]] = weakref.WeakSet()

    def __init__(
        self,
        model: LabModel,
        trace: RoutingTrace | None = None,
        sensitivity: SensitivityProfile | None = None,
        hardware: HardwareProfile | None = None,
        *,
        compensation: Surrogates | None = None,
        texts: Texts | None = None,
    ) -> None:
        """Build the panel for a model; what is not given is measured first.

        Args:
            model: the model to tune.
            trace: its recorded routing, ungated.
            sensitivity: what skipping costs.
            hardware: times of this machine.
            compensation: surrogates of skipped experts; the sensitivity must be measured with
                them.
            texts: texts to measure on, others than those trace and sensitivity are from; the
                second half of the calibration texts if None.

        Raises:
            ValueError: the router chooses a single expert; trace, sensitivity or compensation are
                of another model; the trace was recorded while experts were skipped; or a text is
                too short to measure on. Nothing was measured.
        """
        self._made_by = _running_cell()
        self._close_earlier()
        check_skippable(model.spec)
        for given in (trace, sensitivity, compensation):
            if given is not None:
                given.check_model(model.spec)
        if trace is not None:
            trace.check_ungated()
        if hardware is None:
            check_probed(model)
        calibration, unseen = calibration_split(calibration_texts())
        unseen = unseen if texts is None else as_texts(texts)
        token_sequences(model, unseen, MAX_LOSS_TOKENS)  # refuses what is too short
        if trace is None:
            with model.running(TunedConfig.untuned(model.spec)):
                trace = profile(model, calibration)
        if sensitivity is None:
            sensitivity = measure_sensitivity(model, calibration, compensation=compensation)
        hardware = probe_hardware(model) if hardware is None else hardware
        measuring = Measuring(model, unseen)
        panel = Panel(Session(trace, sensitivity, hardware, compensation), measuring, repr(model))
        # The one reference to the panel, which knows nothing of the workbench: whichever way it
        # is closed, and if the workbench is dropped, it goes, and what it holds with it.
        self._closing = closing = weakref.finalize(self, panel.close)
        closing.atexit = False
        panel.close_button.on_click(lambda _: closing())
        self._open.add(self)

    @property
    def panel(self) -> Panel:
        """The widgets.

        Raises:
            RuntimeError: the workbench is closed.
        """
        alive = self._closing.peek()
        if alive is None:
            raise RuntimeError(CLOSED)
        return alive[1].__self__

    @property
    def config(self) -> TunedConfig:
        """The present setting as a config, with its predicted and measured evidence."""
        return self.panel.config

    @property
    def config_without_skipping(self) -> TunedConfig:
        """The same cache with nothing skipped, to compare with."""
        return self.panel.config_without_skipping

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the plots show the present setting; return False if time ran out."""
        return self.panel.wait(timeout_s)

    def close(self) -> None:
        """Close the panel, cancel what it measures and let the model go; once closed, do nothing.

        A measurement that runs ends at its next step.
        """
        self._closing()

    def __getattr__(self, name: str) -> Any:
        """Return what the panel has by that name."""
        if name.startswith("_"):
            raise AttributeError(f"A workbench has no {name!r}.")
        return getattr(self.panel, name)

    def __repr__(self) -> str:
        """Say whether it is open."""
        return "Workbench()" if self._closing.alive else f"Workbench(): {CLOSED}"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """Show the panel where this is a cell's value, or that it is closed."""
        if not self._closing.alive:
            return {"text/plain": repr(self)}
        return self.panel._repr_mimebundle_(**kwargs)

    def _close_earlier(self) -> None:
        """Close the workbenches that an earlier run of this cell made."""
        cell, run = self._made_by
        for other in list(self._open):
            other_cell, other_run = other._made_by
            if cell is not None and cell == other_cell and run != other_run:
                other.close()


def _running_cell() -> tuple[str | None, str | None]:
    """Return which notebook cell runs, and which run of it this is, as far as that is known."""
    find = getattr(get_ipython(), "get_parent", None)
    request = (find() if find is not None else None) or {}
    return request.get("metadata", {}).get("cellId"), request.get("header", {}).get("msg_id")
