"""The panel of a workbench: controls on the left, what they lead to on the right, and proofs."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets

from adapmoe_lab.records import TunedConfig
from adapmoe_lab.records.progress import Progress
from adapmoe_lab.simulation.simulate import Simulation
from adapmoe_lab.views import figures
from adapmoe_lab.views.widgets import DownloadButton, Job, LatestWins, LiveFigure, OwningBox
from adapmoe_lab.workbench.controls import Controls
from adapmoe_lab.workbench.measuring import Measuring
from adapmoe_lab.workbench.session import Cache, Candidate, Session
from adapmoe_lab.workbench.summary import as_html, tiles

DEFAULT_FILE = "tuned.json"


class Panel(OwningBox):
    """The widgets of a workbench and what they do."""

    def __init__(self, session: Session, measuring: Measuring, about: str) -> None:
        """Build them; `about` says which model this is."""
        self._session = session
        self._measuring = measuring
        self._measured: dict[tuple[bytes, Cache], dict[str, Any]] = {}
        self._worker: LatestWins[Candidate] = LatestWins(self._recompute, self._show_error)
        self.controls = Controls(self._session, self._moved)
        self.summary = ipywidgets.HTML()
        self.layers_figure, self.tradeoff_figure = LiveFigure(), LiveFigure()
        self.error = ipywidgets.HTML()
        self.latency_job = self._job(self._measuring.latency, "latency", "Measure latency")
        self.loss_job = self._job(self._measuring.loss, "loss", "Measure loss")
        self.file_name = ipywidgets.Text(
            DEFAULT_FILE, description="File", layout={"width": "260px"}
        )
        self.save_button = ipywidgets.Button(description="Save", icon="save")
        self.save_button.on_click(lambda _: self._save())
        self.download_button = DownloadButton(DEFAULT_FILE)
        self.file_name.observe(self._file_named, "value")
        self.saved = ipywidgets.HTML()
        self.close_button = ipywidgets.Button(
            description="Close", icon="times", tooltip="Close the workbench and let the model go"
        )
        super().__init__(self._rows(about))
        self._recompute(self.controls.candidate)

    @property
    def config(self) -> TunedConfig:
        """The present setting as a config, with its predicted and measured evidence."""
        candidate = self.controls.candidate
        return self._session.export(candidate, self._measured.get(candidate.key, {}))

    @property
    def config_without_skipping(self) -> TunedConfig:
        """The same cache with nothing skipped, to compare with."""
        return replace(self._session.config(self.controls.candidate), gating=None)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the plots show the present setting; return False if time ran out."""
        return self._worker.wait(timeout_s)

    def close(self) -> None:
        """Compute nothing more, cancel what is measured, and close every widget."""
        self._worker.close()
        super().close()

    def _rows(self, about: str) -> list[ipywidgets.Widget]:
        described = html.escape(about).replace("\n", "<br>")
        left = ipywidgets.VBox([self.controls], layout={"flex": "1 1 380px", "min_width": "340px"})
        right = ipywidgets.VBox(
            [self.summary, self.layers_figure, self.tradeoff_figure],
            layout={"flex": "2 1 560px", "min_width": "420px"},
        )
        export = ipywidgets.HBox(
            [self.file_name, self.save_button, self.download_button, self.saved],
            layout={"align_items": "center", "flex_flow": "row wrap"},
        )
        jobs = [self.latency_job, self.loss_job, export, self.error]
        left.children = [*left.children, *jobs]
        return [
            ipywidgets.HBox(
                [ipywidgets.HTML(f"<small>{described}</small>"), self.close_button],
                layout={"justify_content": "space-between"},
            ),
            ipywidgets.HBox([left, right], layout={"flex_flow": "row wrap", "grid_gap": "16px"}),
        ]

    def _job(
        self, measure: Callable[[TunedConfig, Progress], dict[str, Any]], name: str, label: str
    ) -> Job:
        """Return a job that measures the candidate present when it starts."""

        def work(progress: Progress) -> tuple[Candidate, dict[str, Any]]:
            candidate = self.controls.candidate
            return candidate, measure(self._session.config(candidate), progress)

        def done(result: tuple[Candidate, dict[str, Any]]) -> None:
            candidate, values = result
            self._measured.setdefault(candidate.key, {})[name] = values
            self._worker.submit(self.controls.candidate)

        return Job(work, label, on_done=done)

    def _moved(self, candidate: Candidate) -> None:
        self._measuring.touch()
        self._worker.submit(candidate)

    def _recompute(self, candidate: Candidate) -> None:
        """Show a candidate's quick prediction, then the full one unless there is a newer one."""
        self._show(candidate, self._session.predict(candidate, quick=True))
        self._measuring.touch()
        if candidate is not self.controls.candidate:
            return
        prediction = self._session.predict(candidate)
        self._show(candidate, prediction)
        self._draw_tradeoff(candidate, prediction)
        self.download_button.content = self.config.as_one_file(
            Path(self.download_button.filename).stem
        )
        self.error.value = ""
        self._measuring.touch()

    def _show(self, candidate: Candidate, prediction: Simulation) -> None:
        self.summary.value = as_html(tiles(prediction, self._measured.get(candidate.key, {})))
        baseline = self._session.without_skipping(candidate.cache)
        self.layers_figure.show(
            figures.plot_layer_bars(figures.layer_bars_info(prediction, baseline))
        )

    def _draw_tradeoff(self, candidate: Candidate, prediction: Simulation) -> None:
        points = [
            figures.MeasuredPoint(
                ms_per_token=both["latency"]["ms_per_token"],
                ms_spread=tuple(both["latency"]["ms_spread"]),
                loss_increase_nats=both["loss"]["increase_nats"],
                loss_increase_se=both["loss"]["increase_se"],
                label=f"{both['latency']['skipped_fraction']:.1%} skipped",
            )
            for (_, cache), both in self._measured.items()
            if cache == candidate.cache and {"latency", "loss"} <= set(both)
        ]
        curve = self._session.tradeoff(self.controls.rule.value, candidate.cache)
        info = figures.tradeoff_info(curve, prediction, points)
        self.tradeoff_figure.show(figures.plot_tradeoff(info))

    def _file_named(self, _: object) -> None:
        name = Path(Path(self.file_name.value).name or DEFAULT_FILE)
        suffix = name.suffix if self._session.compensation is None else ".zip"
        self.download_button.filename = str(name.with_suffix(suffix))

    def _save(self) -> None:
        try:
            path = Path(self.file_name.value.strip() or DEFAULT_FILE)
            word = "Replaced" if path.exists() else "Saved"
            self.config.save(path)
            self.saved.value = f"{word} <code>{html.escape(str(path))}</code>"
        except (OSError, ValueError) as error:
            self._show_error(error)

    def _show_error(self, error: Exception) -> None:
        text = html.escape(f"{type(error).__name__}: {error}")
        self.error.value = f"<b style='color:var(--jp-error-color1,#c00)'>{text}</b>"
