"""Verifying a model on the machine it runs on, from its logits to its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.exactness import compare_with_plain
from adapmoe_lab.evaluation.latency import N_DEFAULT_PROMPTS, PROMPT_TOKENS, measure_latency
from adapmoe_lab.evaluation.loss import token_sequences
from adapmoe_lab.evaluation.texts import Texts, as_texts, calibration_split, calibration_texts
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.models.support import UnsupportedModelError
from adapmoe_lab.profiling.hardware.probe import probe_hardware
from adapmoe_lab.profiling.hardware.timed_steps import UntimedExecutorError
from adapmoe_lab.records import HardwareProfile, LatencyReport, RecordError, TunedConfig
from adapmoe_lab.records.arguments import whole_number
from adapmoe_lab.records.latency import merged
from adapmoe_lab.records.progress import Progress
from adapmoe_lab.records.verify_report import Check, VerifyReport
from adapmoe_lab.tuning.verify.conditions import verify_conditions
from adapmoe_lab.tuning.verify.counters import EXECUTOR, check_executor
from adapmoe_lab.tuning.verify.decoded import record_decode
from adapmoe_lab.tuning.verify.exactness import EXACTNESS, check_exactness
from adapmoe_lab.tuning.verify.losses import LOSS, check_loss
from adapmoe_lab.tuning.verify.timing import PREDICTION, SPEED, check_prediction, check_speed

T = TypeVar("T")

N_COMPARED, COMPARED_TOKENS = 4, 128
"""Texts whose logits are compared with the plain model's, and the most tokens of each."""


def verify(
    model: LabModel,
    config: TunedConfig | None = None,
    texts: Texts | None = None,
    *,
    new_tokens: int = 32,
    repeats: int = 3,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check that a model does on this machine what the project says, in a few minutes.

    Five checks, each passed, failed, measured (there is no bound), or not known (with the reason):

    - exactness: logits and greedy tokens, with nothing skipped, against the plain transformers
      model, see `compare_with_plain`; not known where that does not fit beside this one.
    - executor: which one runs, and its counters against a replay of what was routed meanwhile.
    - speed: prefill and decode, see `measure_latency`.
    - prediction: the time per output token predicted by probing this machine, by rounds of probing
      and measuring, within 10 %; not known where rounds differ by more.
    - loss: what the config costs against nothing skipped, and whether that is what its evidence
      says.

    The model's configuration is as before afterwards.

    Args:
        model: the model to verify.
        config: the configuration to verify; the present one if None.
        texts: texts to run, the first few of them also as prompts; the half of the shipped
            calibration texts that nothing is calibrated on if None.
        new_tokens: output tokens per prompt.
        repeats: rounds of timing every prompt; of one alone no prediction is judged.
        progress: called with (done, total, text); what it raises stops the run.

    Raises:
        RecordError: the config was tuned for another model.
        ValueError: there is no text, one too short to predict anything, or something else; a count
            is too small; or the executor does not run the config. Nothing was run.
    """
    new_tokens = whole_number("new_tokens", new_tokens, at_least=2)
    repeats = whole_number("repeats", repeats, at_least=1)
    listed = calibration_split(calibration_texts())[1] if texts is None else as_texts(texts)
    sequences = token_sequences(model, listed)
    with model.running(config):
        config = model.effective_config
    work = _Work(model, config, listed, sequences, new_tokens, repeats, progress)
    checks = (
        _judged(EXACTNESS, work.exactness),
        _judged(EXECUTOR, work.executor),
        *work.speed_and_prediction(),
        _judged(LOSS, work.loss),
    )
    with model.running(config):
        conditions = verify_conditions(model, config, listed)
    return VerifyReport(checks, {**conditions, "new_tokens": new_tokens, "repeats": repeats})


@dataclass(frozen=True, eq=False)
class _Work:
    """What is verified, and on what; each method makes a check or two of it.

    Attributes:
        model: the model.
        config: the config, with its slots.
        texts: what is run.
        sequences: the same as token ids int64 [T] each.
        new_tokens: output tokens per prompt.
        repeats: times every prompt is timed.
        progress: is told how far each check is.
    """

    model: LabModel
    config: TunedConfig
    texts: list[str]
    sequences: Sequence[torch.Tensor]
    new_tokens: int
    repeats: int
    progress: Progress | None

    @property
    def prompts(self) -> list[torch.Tensor]:
        """Token ids of what `measure_latency` continues."""
        return [ids[:PROMPT_TOKENS] for ids in self.sequences[:N_DEFAULT_PROMPTS]]

    def exactness(self) -> Check:
        compared = [ids[:COMPARED_TOKENS] for ids in self.sequences[:N_COMPARED]]
        found = compare_with_plain(
            self.model, self.config, compared, self.prompts[0], self.new_tokens, self.progress
        )
        return check_exactness(found)

    def executor(self) -> Check:
        return check_executor(
            record_decode(self.model, self.config, self.prompts, self.new_tokens, self.progress)
        )

    def speed_and_prediction(self) -> tuple[Check, Check]:
        rounds: list[LatencyReport] = []
        probes: list[HardwareProfile] = []
        unknown: Check | None = None

        def speed() -> Check:
            nonlocal unknown
            for number in range(self.repeats + 1):
                if unknown is None:
                    unknown = _judged(PREDICTION, partial(self._probe, number, probes))
                if number < self.repeats:
                    rounds.append(self._measured())
            return check_speed(merged(rounds))

        of_speed = _judged(SPEED, speed)
        if unknown is None and len(rounds) < self.repeats:
            unknown = Check(PREDICTION, "not known", f"nothing was measured: {of_speed.found}")
        return of_speed, unknown or _judged(PREDICTION, partial(self._prediction, rounds, probes))

    def loss(self) -> Check:
        return check_loss(self.model, self.config, self.texts, self.progress)

    def _measured(self) -> LatencyReport:
        return measure_latency(
            self.model,
            self.config,
            self.texts[:N_DEFAULT_PROMPTS],
            new_tokens=self.new_tokens,
            repeats=1,
            progress=self.progress,
        )

    def _probe(self, number: int, probes: list[HardwareProfile]) -> None:
        if self.progress is not None:
            self.progress(number, self.repeats + 1, "probing the machine")
        probes.append(probe_hardware(self.model))

    def _prediction(
        self, rounds: Sequence[LatencyReport], probes: Sequence[HardwareProfile]
    ) -> Check:
        as_it_is = replace(self.config, gating=None, compensation=None)
        decoded = record_decode(self.model, as_it_is, self.prompts, self.new_tokens, self.progress)
        return check_prediction(decoded.trace, self.config, rounds, probes)


def _judged(name: str, check: Callable[[], T]) -> T | Check:
    """Return what a check gives, or the check where it came to no numbers.

    It is not known where something does not fit, is gone, or is not done for the model's family,
    and has failed where what was read is damaged or what was computed is not finite.
    """
    try:
        return check()
    except (
        UnsupportedModelError,
        UntimedExecutorError,
        OSError,
        MemoryError,
        torch.OutOfMemoryError,
    ) as error:
        return Check(name, "not known", str(error))
    except (CheckpointError, RecordError) as error:
        return Check(name, "failed", str(error))
