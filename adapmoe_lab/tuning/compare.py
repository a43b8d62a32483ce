"""One comparison in one run: decode with and without skipping, on each link, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.loading import known_targets, link_target
from adapmoe_lab.engine.transfer.link import NO_LINK
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.evaluation.latency import measure_latency
from adapmoe_lab.evaluation.loss import evaluate_loss, token_sequences
from adapmoe_lab.evaluation.texts import Texts, as_texts, calibration_split, calibration_texts
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.gating.registry import check_method
from adapmoe_lab.policies.gating.rule import check_skipped_fraction
from adapmoe_lab.profiling.routing.profile import profile
from adapmoe_lab.profiling.sensitivity.sensitivity import sensitivity
from adapmoe_lab.records import LatencyReport, LinkTarget, TunedConfig
from adapmoe_lab.records.arguments import strings, whole_number
from adapmoe_lab.records.files import save_json
from adapmoe_lab.records.latency import merged
from adapmoe_lab.records.standard_error import error_text
from adapmoe_lab.tuning.tune import check_skippable, tune

Say = Callable[[str], None]

VARIED = ("gating", "compensation")


@dataclass(frozen=True)
class BenchRow:
    """One skipped fraction on one link, against the same cache without skipping.

    Attributes:
        link: the link, on a CPU `emulated:<target>` or `none`.
        load_ratio: time to load one expert over the resident time of one layer; None if the link
            is real or there is none.
        requested_fraction: share of expert activations that the cuts were chosen to skip.
        skipped_fraction: share that was skipped while decoding; other text, other share.
        experts_per_token: experts run per token and layer.
        decode_speedup: time per output token without skipping over that with it, medians of runs.
        loads_ratio: experts loaded per token, with skipping over without.
        loss_increase_nats: measured loss increase per token.
        loss_increase_se: its standard error over texts; None if not known, as with one text.
    """

    link: str
    load_ratio: float | None
    requested_fraction: float
    skipped_fraction: float
    experts_per_token: float
    decode_speedup: float
    loads_ratio: float
    loss_increase_nats: float
    loss_increase_se: float | None


@dataclass(frozen=True)
class BenchReport:
    """All rows of a run, its conditions and the raw samples they come from."""

    rows: tuple[BenchRow, ...]
    conditions: dict[str, Any]
    samples: tuple[dict[str, Any], ...]

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON, whole or not at all, and return its path."""
        path = Path(path)
        document = asdict(self)
        for row in document["rows"]:
            row["asked_fraction"] = row.pop("requested_fraction")  # as files of before name it
        save_json(path, document, allow_nan=False)
        return path

    def table(self) -> str:
        """Return the rows as a Markdown table of ratios."""
        lines = [
            "| link | load / layer | to skip | skipped | experts/token | decode | loads "
            "| loss, nats |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            unratioed = NO_LINK if row.link == NO_LINK else "real"
            ratio = unratioed if row.load_ratio is None else f"{row.load_ratio:.2f}"
            lines.append(
                f"| {row.link} | {ratio} | {row.requested_fraction:.1%} | "
                f"{row.skipped_fraction:.1%} | "
                f"{row.experts_per_token:.2f} | {row.decode_speedup:.2f}x | "
                f"{row.loads_ratio:.2f}x | "
                f"{row.loss_increase_nats:+.4f} {error_text(row.loss_increase_se, '.4f')} |"
            )
        return "\n".join(lines)


def run_bench(
    model: LabModel,
    *,
    targets: str | Iterable[str] | None = None,
    skipped_fractions: float | Sequence[float] = (0.125, 0.25),
    slots_per_layer: int | None = None,
    method: str = "uniform",
    texts: Texts | None = None,
    new_tokens: int = 48,
    rounds: int = 3,
    say: Say = print,
) -> BenchReport:
    """Measure decode and loss at each skipped fraction, against none, on each link.

    Cuts are chosen on the first half of the calibration texts; latency runs on prompts from the
    second half, loss on `texts`. Configurations are interleaved, round by round, so that a machine
    whose speed drifts treats them alike.

    Args:
        model: the model to run.
        targets: link targets to emulate on a CPU, `none` for no link; all known ones if None. A
            GPU has its own link. The model's link is as before afterwards.
        skipped_fractions: shares of expert activations to skip.
        slots_per_layer: experts a layer holds; half of them if None.
        method: how cuts are chosen, see `tune`.
        texts: texts to measure loss on; the second half of the calibration texts if None.
        new_tokens: output tokens per prompt.
        rounds: how often every configuration is measured.
        say: called with what is being done.

    Raises:
        ValueError: an argument is out of range or unknown, or a target is named where the link is
            real; nothing was measured.
    """
    new_tokens = whole_number("new_tokens", new_tokens, at_least=2)
    rounds = whole_number("rounds", rounds, at_least=1)
    links = _links(model, targets)
    check_method(method)
    _check_can_skip(model)
    fractions = _fractions(model, skipped_fractions)
    fit, held = calibration_split(calibration_texts())
    texts = held if texts is None else as_texts(texts)
    token_sequences(model, texts)  # refuses what is too short
    n_slots = model.spec.n_experts // 2 if slots_per_layer is None else slots_per_layer
    n_slots = whole_number("slots_per_layer", n_slots, at_least=0)
    plain = replace(TunedConfig.untuned(model.spec), plan=slots_plan(model.spec, n_slots))
    say(f"Calibrating on {len(fit)} texts, measuring loss on {len(texts)} others.")
    configs = _skipping(model, plain, fit, fractions, method)
    baseline = evaluate_loss(model, plain, texts)
    losses = [evaluate_loss(model, c, texts).increase_over(baseline) for c in configs]
    rows: list[BenchRow] = []
    samples: list[dict[str, Any]] = []
    for target in links:
        load_ratio = target.load_ratio if target is not None else None
        with _over(model, target):
            say(f"Measuring decode over {model.link.name}, {rounds} rounds.")
            reports = _interleaved(model, [plain, *configs], held, new_tokens, rounds)
            samples += [
                {"link": model.link.name, "decode_s": report.decode.samples.tolist()}
                for report in reports
            ]
            for asked, report, loss in zip(fractions, reports[1:], losses, strict=True):
                rows.append(_row(model, load_ratio, asked, reports[0], report, loss))
    conditions = {
        **_conditions(model, rows),
        "slots_per_layer": n_slots,
        "method": method,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "loss_tokens": int(baseline.n_predicted.sum()),
    }
    return BenchReport(tuple(rows), conditions, tuple(samples))


def _conditions(model: LabModel, rows: Sequence[BenchRow]) -> dict[str, Any]:
    """Return what the machine says of itself, and what the rows were measured over and against."""
    here = measurement_conditions(model)
    del here["link"]
    links = list(dict.fromkeys(row.link for row in rows))
    return {**here, "links": links, "baseline": "same engine, slots and LRU, nothing skipped"}


def _fractions(model: LabModel, skipped_fractions: float | Sequence[float]) -> list[float]:
    """Return the fractions to skip, at least one, each of which the model can skip."""
    fractions = [float(one) for one in np.ravel(skipped_fractions)]
    if not fractions:
        raise ValueError("run_bench needs at least one skipped fraction, such as 0.25.")
    for fraction in fractions:
        check_skipped_fraction(fraction, model.spec.top_k)
    return fractions


def _skipping(
    model: LabModel,
    plain: TunedConfig,
    texts: Sequence[str],
    fractions: Sequence[float],
    method: str,
) -> list[TunedConfig]:
    """Return a config with the same slots for each fraction, its cuts chosen on texts."""
    with model.running(TunedConfig.untuned(model.spec)):
        trace = profile(model, texts)
    measured = sensitivity(model, texts)
    return [
        replace(plain, gating=tune(trace, measured, skipped_fraction=f, method=method).gating)
        for f in fractions
    ]


def _over(model: LabModel, target: LinkTarget | None) -> AbstractContextManager[object]:
    """Return a context in which loads cross a target's link; a GPU has its own."""
    return nullcontext() if model.engine.device.type == "cuda" else model.linked(target)


def _check_can_skip(model: LabModel) -> None:
    """Refuse a model whose router chooses one expert, and an executor that skips none."""
    check_skippable(model.spec)
    model.engine.capabilities.check_gated()


def _links(model: LabModel, names: str | Iterable[str] | None) -> list[LinkTarget | None]:
    """Return the targets to emulate; None is a GPU's real link, and no link on a CPU."""
    device = model.engine.device
    if names is None:
        names = known_targets() if device.type == "cpu" else []
        return [link_target(name, device) for name in names] or [None]
    listed = strings("targets", names)
    if not listed:
        raise ValueError(
            f"run_bench needs at least one target, such as {NO_LINK!r}; leave targets out for all."
        )
    return [link_target(name, device) for name in listed]


def _interleaved(
    model: LabModel,
    configs: Sequence[TunedConfig],
    prompts: Sequence[str],
    new_tokens: int,
    rounds: int,
) -> list[LatencyReport]:
    """Measure every config once per round and return one report each, all rounds together."""
    turns: list[list[LatencyReport]] = [[] for _ in configs]
    for turn in range(rounds):
        chosen = [prompts[(turn * 2 + i) % len(prompts)] for i in range(2)]
        for reports, config in zip(turns, configs, strict=True):
            reports.append(measure_latency(model, config, chosen, new_tokens=new_tokens, repeats=1))
    return [merged(reports) for reports in turns]


def _row(
    model: LabModel,
    load_ratio: float | None,
    requested_fraction: float,
    plain: LatencyReport,
    gated: LatencyReport,
    loss_increase: tuple[float, float | None],
) -> BenchRow:
    skipped = gated.decode_traffic.skipped_fraction
    return BenchRow(
        link=model.link.name,
        load_ratio=load_ratio,
        requested_fraction=requested_fraction,
        skipped_fraction=skipped,
        experts_per_token=model.spec.experts_run(skipped),
        decode_speedup=plain.decode.ratio_to(gated.decode, varied=VARIED),
        loads_ratio=float(
            gated.decode_traffic.misses.sum() / max(1, plain.decode_traffic.misses.sum())
        ),
        loss_increase_nats=loss_increase[0],
        loss_increase_se=loss_increase[1],
    )
