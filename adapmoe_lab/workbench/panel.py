"""The workbench: controls on the left, what they lead to on the right, buttons that prove it."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets

from adapmoe_lab.engine.hardware import probe_hardware
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.texts import Texts, as_texts, calibration_texts
from adapmoe_lab.profiling.routing import profile
from adapmoe_lab.profiling.sensitivity import sensitivity as measure_sensitivity
from adapmoe_lab.records import (
    HardwareProfile,
    RoutingTrace,
    SensitivityProfile,
    Surrogates,
    TunedConfig,
)
from adapmoe_lab.simulation.simulate import Simulation
from adapmoe_lab.views import figures
from adapmoe_lab.views.widgets import DownloadButton, Job, LatestWins, LiveFigure
from adapmoe_lab.workbench.controls import Controls
from adapmoe_lab.workbench.draft import Bench, Cache, Draft
from adapmoe_lab.workbench.measuring import Measuring, Progress
from adapmoe_lab.workbench.readout import as_html, tiles

DEFAULT_FILE = "tuned.json"


class Workbench(ipywidgets.VBox):
    """The interactive panel: tune thresholds and cache, predict, measure, export.

    It opens with half of the experts kept and the most skipped that is predicted to cost at most
    one percent of perplexity.
    """

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
            compensation: what stands in for skipped experts; the sensitivity must be measured
                with it.
            texts: texts to measure on, others than those trace and sensitivity are from; the
                second half of the calibration texts if None.
        """
        shipped = calibration_texts()
        half = len(shipped) // 2
        held = shipped[half:] if texts is None else as_texts(texts)
        trace = profile(model, shipped[:half]) if trace is None else trace
        if sensitivity is None:
            sensitivity = measure_sensitivity(model, shipped[:half], compensation=compensation)
        hardware = probe_hardware(model) if hardware is None else hardware
        self._bench = Bench(trace, sensitivity, hardware, compensation)
        self._measuring = Measuring(model, held)
        self._measured: dict[tuple[bytes, Cache], dict[str, Any]] = {}
        self._worker: LatestWins[Draft] = LatestWins(self._recompute, self._show_error)
        self.controls = Controls(self._bench, self._moved)
        self.readout = ipywidgets.HTML()
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
        super().__init__(self._rows(model))
        self._recompute(self.controls.draft)

    @property
    def config(self) -> TunedConfig:
        """The present setting as a config, with its predicted and measured evidence."""
        draft = self.controls.draft
        return self._bench.export(draft, self._measured.get(draft.key, {}))

    @property
    def config_without_skipping(self) -> TunedConfig:
        """The same cache with nothing skipped, to compare with."""
        return replace(self._bench.config(self.controls.draft), gating=None)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the plots show the present setting; return False if time ran out."""
        return self._worker.wait(timeout_s)

    def _rows(self, model: LabModel) -> list[ipywidgets.Widget]:
        about = html.escape(repr(model)).replace("\n", "<br>")
        left = ipywidgets.VBox([self.controls], layout={"flex": "1 1 380px", "min_width": "340px"})
        right = ipywidgets.VBox(
            [self.readout, self.layers_figure, self.tradeoff_figure],
            layout={"flex": "2 1 560px", "min_width": "420px"},
        )
        export = ipywidgets.HBox(
            [self.file_name, self.save_button, self.download_button, self.saved],
            layout={"align_items": "center", "flex_flow": "row wrap"},
        )
        jobs = [self.latency_job, self.loss_job, export, self.error]
        left.children = [*left.children, *jobs]
        return [
            ipywidgets.HTML(f"<small>{about}</small>"),
            ipywidgets.HBox([left, right], layout={"flex_flow": "row wrap", "grid_gap": "16px"}),
        ]

    def _job(
        self, measure: Callable[[TunedConfig, Progress], dict[str, Any]], name: str, label: str
    ) -> Job:
        """Return a job that measures the draft present when it starts."""

        def work(progress: Progress) -> tuple[Draft, dict[str, Any]]:
            draft = self.controls.draft
            return draft, measure(self._bench.config(draft), progress)

        def done(result: tuple[Draft, dict[str, Any]]) -> None:
            draft, values = result
            self._measured.setdefault(draft.key, {})[name] = values
            self._worker.submit(self.controls.draft)

        return Job(work, label, on_done=done)

    def _moved(self, draft: Draft) -> None:
        self._measuring.touch()
        self._worker.submit(draft)

    def _recompute(self, draft: Draft) -> None:
        """Show the quick prediction of a draft, then the full one unless a newer draft is there."""
        self._show(draft, self._bench.predict(draft, quick=True))
        self._measuring.touch()
        if draft is not self.controls.draft:
            return
        prediction = self._bench.predict(draft)
        self._show(draft, prediction)
        self._draw_tradeoff(draft, prediction)
        self.download_button.content = self.config.as_one_file(
            Path(self.download_button.filename).stem
        )
        self.error.value = ""
        self._measuring.touch()

    def _show(self, draft: Draft, prediction: Simulation) -> None:
        self.readout.value = as_html(tiles(prediction, self._measured.get(draft.key, {})))
        baseline = self._bench.without_skipping(draft.cache)
        self.layers_figure.show(
            figures.plot_layer_bars(figures.layer_bars_info(prediction, baseline))
        )

    def _draw_tradeoff(self, draft: Draft, prediction: Simulation) -> None:
        points = [
            figures.MeasuredPoint(
                ms_per_token=both["latency"]["ms_per_token"],
                ms_spread=tuple(both["latency"]["ms_spread"]),
                loss_increase_nats=both["loss"]["increase_nats"],
                loss_increase_se=both["loss"]["increase_se"],
                label=f"{both['latency']['skipped_fraction']:.1%} skipped",
            )
            for (_, cache), both in self._measured.items()
            if cache == draft.cache and {"latency", "loss"} <= set(both)
        ]
        curve = self._bench.tradeoff(self.controls.rule.value, draft.cache)
        info = figures.tradeoff_info(curve, prediction, points)
        self.tradeoff_figure.show(figures.plot_tradeoff(info))

    def _file_named(self, _: object) -> None:
        name = Path(Path(self.file_name.value).name or DEFAULT_FILE)
        suffix = name.suffix if self._bench.compensation is None else ".zip"
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
