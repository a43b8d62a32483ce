"""A long piece of work behind a button, with progress and Cancel."""

from __future__ import annotations

import html
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import ipywidgets
import traitlets

from adapmoe_lab.records.progress import Progress
from adapmoe_lab.views.widgets.owning_box import OwningBox

STATES = ("idle", "running", "done", "cancelled", "error")
REFRESH_S = 0.1
_BAR_STYLES: Mapping[str, str] = MappingProxyType(
    {"done": "success", "cancelled": "warning", "error": "danger"}
)


class Cancelled(Exception):  # noqa: N818 not an error: the user asked for it
    """Raised by `progress` inside the work once Cancel was pressed."""


class Job(OwningBox):
    """A panel that runs one function in a thread; it has no thread while nothing runs.

    Attributes:
        state: `idle`, `running`, `done`, `cancelled` or `error`; may be observed.
        result: what the work returned last.
        error: what ended the last run, be it the work or `on_done`; None if nothing did.
    """

    state = traitlets.Enum(STATES, default_value="idle")

    def __init__(
        self,
        work: Callable[[Progress], Any],
        label: str = "Run",
        on_done: Callable[[Any], object] | None = None,
    ) -> None:
        """Build the panel; nothing runs before `start` or a click.

        Args:
            work: the function to run; calls the `progress` it is given now and then, from any
                thread and as often as it likes, which raises Cancelled if the work should end.
            label: text of the button.
            on_done: receives the result, in the thread of the work.
        """
        self.result: Any = None
        self.error: BaseException | None = None
        self._work = work
        self._on_done = on_done
        self._starting = threading.Lock()
        self._is_closed = False
        self._cancel_asked = threading.Event()
        self._finished = threading.Event()
        self._finished.set()
        self._reported = (0.0, 1.0, "")
        wide = {"width": "auto"}
        self.run_button = ipywidgets.Button(
            description=label, icon="play", button_style="primary", layout=wide
        )
        self.cancel_button = ipywidgets.Button(
            description="Cancel", icon="stop", disabled=True, layout=wide
        )
        thin = {"width": "120px", "height": "14px", "margin": "0 8px", "visibility": "hidden"}
        self.bar = ipywidgets.FloatProgress(min=0, max=1, layout=thin)
        self.message, self.details = ipywidgets.HTML(), ipywidgets.HTML()
        row = ipywidgets.HBox(
            [self.run_button, self.cancel_button, self.bar, self.message],
            layout={"align_items": "center", "flex_flow": "row wrap"},
        )
        super().__init__([row, self.details])
        self.run_button.on_click(lambda _: self.start())
        self.cancel_button.on_click(lambda _: self.cancel())

    def start(self) -> bool:
        """Start the work unless it is running or closed; return whether it was started."""
        with self._starting:
            if self._is_closed or not self._finished.is_set():
                return False
            self._finished.clear()
        self._cancel_asked.clear()
        self.error, self._reported = None, (0.0, 1.0, "")
        self.run_button.disabled, self.cancel_button.disabled = True, False
        self.bar.bar_style, self.bar.value, self.bar.layout.visibility = "", 0.0, "visible"
        self.message.value = self.details.value = ""
        self.state = "running"
        threading.Thread(target=self._run, daemon=True, name="job").start()
        return True

    def cancel(self) -> None:
        """Ask the work to stop; it does so at its next call of `progress`."""
        self._cancel_asked.set()
        self.cancel_button.disabled = True

    def close(self) -> None:
        """Cancel what runs, without waiting for it to stop, and close the panel for good."""
        self._is_closed = True
        self.cancel()
        super().close()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing runs; return False if time ran out."""
        return self._finished.wait(timeout_s)

    def _progress(self, done: float, total: float, text: str = "") -> None:
        if self._cancel_asked.is_set():
            raise Cancelled
        self._reported = (done, total, text)

    def _run(self) -> None:
        started_s, ended = time.monotonic(), threading.Event()
        refresher = threading.Thread(
            target=self._refresh, args=(started_s, ended), daemon=True, name="job-progress"
        )
        refresher.start()
        try:
            state = self._outcome()
            ended.set()
            refresher.join()
            self._show_end(state, time.monotonic() - started_s)
        finally:
            self._finished.set()

    def _outcome(self) -> str:
        try:
            self.result = self._work(self._progress)
            if self._on_done is not None:
                self._on_done(self.result)
        except Cancelled:
            return "cancelled"
        except BaseException as error:  # even SystemExit must not leave the panel running
            self.error = error
            return "error"
        return "done"

    def _refresh(self, started_s: float, ended: threading.Event) -> None:
        """Show the newest report at a steady pace, whatever the pace of the reports."""
        while not ended.wait(REFRESH_S):
            done, total, text = self._reported
            if self._cancel_asked.is_set():
                text = "cancelling"
            self.bar.value = min(1.0, done / total) if total else 0.0
            self.message.value = _line(text, time.monotonic() - started_s)

    def _show_end(self, state: str, elapsed_s: float) -> None:
        self.bar.bar_style = _BAR_STYLES[state]
        if state == "done":
            self.bar.value = 1.0
        if self.error is None:
            self.message.value = _line(state, elapsed_s)
        else:
            reason = "".join(traceback.format_exception_only(self.error)).strip()
            self.message.value = (
                f'<b style="color: var(--jp-error-color1)">{html.escape(reason)}</b>'
            )
            trace = html.escape("".join(traceback.format_exception(self.error)))
            self.details.value = f"<details><summary>details</summary><pre>{trace}</pre></details>"
        self.run_button.disabled, self.cancel_button.disabled = False, True
        self.state = state


def _line(text: str, elapsed_s: float) -> str:
    return html.escape(f"{text} · {elapsed_s:.0f} s" if text else f"{elapsed_s:.0f} s")
