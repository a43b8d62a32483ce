"""Measured latency and traffic of a configuration, prefill apart from decode."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from adapmoe_lab.engine.executor import Executor
from adapmoe_lab.engine.generation.tokens import generate_tokens
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.evaluation.texts import Texts, as_texts, calibration_texts
from adapmoe_lab.records import LatencyReport, Measurement, Traffic, TunedConfig
from adapmoe_lab.records.arguments import whole_number
from adapmoe_lab.records.progress import Progress

N_DEFAULT_PROMPTS = 4
PROMPT_TOKENS = 32
MAX_TRIES = 20


class _Phase:
    """Samples and traffic of one phase, added up run by run."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.passed: list[Traffic] = []

    def traffic(self) -> Traffic:
        return sum(self.passed[1:], self.passed[0])


class _Stopwatch:
    """Splits a run into its prefill and decode steps; reporting it is not timed."""

    def __init__(self, engine: Executor, report: Callable[[int], None]) -> None:
        self.phases = (_Phase(), _Phase())
        self.per_token: list[float] = []
        self._engine = engine
        self._report = report
        self.start()

    def start(self) -> None:
        self._laps: list[tuple[float, Traffic]] = []
        self._mark()

    def lap(self, step: int) -> None:
        seconds = self._engine.clock.now() - self._started
        self._laps.append((seconds, self._engine.traffic - self._before))
        self._report(step)
        self._mark()

    def keep(self) -> None:
        """Count the laps since `start`; those never kept are forgotten."""
        for step, (seconds, traffic) in enumerate(self._laps):
            phase = self.phases[min(step, 1)]
            phase.seconds.append(seconds)
            phase.passed.append(traffic)
        self.per_token.append(float(np.mean([seconds for seconds, _ in self._laps[1:]])))

    def _mark(self) -> None:
        self._before = self._engine.traffic
        self._started = self._engine.clock.now()


def measure_latency(
    model: LabModel,
    config: TunedConfig | None = None,
    prompts: Texts | None = None,
    *,
    new_tokens: int = 32,
    repeats: int = 3,
    max_prompt_tokens: int = PROMPT_TOKENS,
    progress: Progress | None = None,
    was_disturbed: Callable[[], bool] | None = None,
) -> LatencyReport:
    """Measure seconds per prompt and per output token, greedy, batch 1.

    The caches start empty and stay as they are from prompt to prompt; one run of the first
    prompt is thrown away as warm-up. A step ends when its token is known on the host. Steps that
    load nothing and steps that load much differ by multiples, so a run's time per output token is
    the mean over its steps; the samples are one per run.

    Args:
        model: the model to run.
        config: the configuration to run under; the present one if None.
        prompts: texts to continue; the starts of the shipped calibration texts if None.
        new_tokens: output tokens per prompt; the first belongs to prefill.
        repeats: times every prompt is run.
        max_prompt_tokens: longer prompts are cut to this many tokens.
        progress: called with (done, total, text); what it raises stops the run.
        was_disturbed: called after every run; whether something else used the machine meanwhile;
            such a run is thrown away and taken again.

    Raises:
        ValueError: there is no prompt, an empty one, or something else; or a count is too small.
        RuntimeError: every run was disturbed.
    """
    new_tokens = whole_number("new_tokens", new_tokens, at_least=2)
    repeats = whole_number("repeats", repeats, at_least=1)
    max_prompt_tokens = whole_number("max_prompt_tokens", max_prompt_tokens, at_least=1)
    texts = (
        calibration_texts()[:N_DEFAULT_PROMPTS] if prompts is None else as_texts(prompts, "prompts")
    )
    encoded = [model.encode(text)[:max_prompt_tokens] for text in texts]
    if not encoded or any(not len(ids) for ids in encoded):
        raise ValueError("Latency needs at least one prompt, none of them empty.")
    runs = [encoded[0], *encoded * repeats]

    def report(step: int) -> None:
        if progress is not None:
            done, n_steps = number * new_tokens + step + 1, len(runs) * new_tokens
            progress(done, n_steps, "measuring latency")

    with model.running(config):
        watch = _Stopwatch(model.engine, report)
        for number, prompt in enumerate(runs):
            _run_undisturbed(model, prompt, new_tokens, watch, was_disturbed)
            if number > 0:
                watch.keep()
        conditions = {
            **measurement_conditions(model),
            **model.effective_config.section_fingerprints(),
            "prompt_tokens": tuple(len(ids) for ids in encoded),
            "new_tokens": new_tokens,
        }
    prefill, decoding = watch.phases
    return LatencyReport(
        prefill=Measurement(prefill.seconds, "s", 1, conditions),
        decode=Measurement(watch.per_token, "s", 1, conditions),
        decode_steps=Measurement(decoding.seconds, "s", new_tokens - 1, conditions),
        prefill_traffic=prefill.traffic(),
        decode_traffic=decoding.traffic(),
    )


def _run_undisturbed(
    model: LabModel,
    prompt: torch.Tensor,
    new_tokens: int,
    watch: _Stopwatch,
    was_disturbed: Callable[[], bool] | None,
) -> None:
    """Time a run, again and again until nothing disturbed it."""
    for _ in range(MAX_TRIES):
        watch.start()
        for step, _ in enumerate(generate_tokens(model.decoder(), prompt, new_tokens)):
            watch.lap(step)
        if was_disturbed is None or not was_disturbed():
            return
    raise RuntimeError(
        f"The measurement was disturbed {MAX_TRIES} times in a row; leave the controls alone while "
        "it runs."
    )
