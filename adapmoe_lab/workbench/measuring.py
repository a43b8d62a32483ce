"""What the workbench's two buttons run: latency and loss of one candidate, as plain values."""

from __future__ import annotations

import time
from typing import Any

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.latency import measure_latency
from adapmoe_lab.evaluation.loss import evaluate_loss
from adapmoe_lab.evaluation.texts import Texts, as_texts
from adapmoe_lab.records import LossReport, TunedConfig
from adapmoe_lab.records.progress import Progress

N_PROMPTS = 3
NEW_TOKENS = 16
MAX_LOSS_TOKENS = 256


class Measuring:
    """Runs a model under configs, on texts that nothing was chosen by."""

    def __init__(self, model: LabModel, texts: Texts) -> None:
        """Bind the model and the texts; the start of the first few are the prompts."""
        self._model = model
        self._texts = as_texts(texts)
        self._baseline: LossReport | None = None
        self._touched = 0.0

    def touch(self) -> None:
        """Note that the machine was busy with something else just now."""
        self._touched = time.monotonic()

    def latency(self, config: TunedConfig, progress: Progress) -> dict[str, Any]:
        """Measure decode under a config; runs during which something else ran are repeated."""
        started = [time.monotonic()]

        def was_disturbed() -> bool:
            disturbed = self._touched > started[0]
            started[0] = time.monotonic()
            return disturbed

        report = measure_latency(
            self._model,
            config,
            self._texts[:N_PROMPTS],
            new_tokens=NEW_TOKENS,
            repeats=2,
            progress=progress,
            was_disturbed=was_disturbed,
        )
        traffic = report.decode_traffic
        return {
            "ms_per_token": 1e3 * report.decode.median,
            "ms_spread": [1e3 * seconds for seconds in report.decode.spread],
            "n_runs": len(report.decode.samples),
            "hit_rate": traffic.hit_rate,
            "skipped_fraction": traffic.skipped_fraction,
            "experts_per_token": self._model.spec.experts_run(traffic.skipped_fraction),
            "link": self._model.link.name,
        }

    def loss(self, config: TunedConfig, progress: Progress) -> dict[str, Any]:
        """Measure the loss increase of a config over the unmodified model, paired by text."""
        measure = {"max_tokens": MAX_LOSS_TOKENS, "progress": progress}
        if self._baseline is None:
            untuned = TunedConfig.untuned(self._model.spec)
            self._baseline = evaluate_loss(self._model, untuned, self._texts, **measure)
        report = evaluate_loss(self._model, config, self._texts, **measure)
        increase, error = report.increase_over(self._baseline)
        return {
            "increase_nats": increase,
            "increase_se": error,
            "skipped_fraction": report.skipped_fraction,
            "n_tokens": int(report.n_predicted.sum()),
        }
