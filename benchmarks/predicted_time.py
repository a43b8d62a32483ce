"""Predicted milliseconds per output token against those measured, cache, gating and prefetch apart.

`python benchmarks/predicted_time.py MODEL --out FILE [--target NAME ...] [--rounds N]
[--prompts N]`; a model whose weights are random wants more prompts, each of which it continues in
a way of its own.

In every round the machine is probed, every configuration measured one after the other, and the
machine probed again; predicted is the mean of the two probes' predictions, so that what else the
machine does falls on all alike. The probe decodes a prompt of its own in a memory size of its own.
The trace that is replayed was recorded without gating; as in a measurement its first sequence comes
twice, to warm up, and prompts do not count. A configuration's error is that of the median over
rounds of predicted over measured. The file is saved after every round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import adapmoe_lab as lab
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.policies.gating.uniform import UniformCut
from adapmoe_lab.records import HardwareProfile, RoutingTrace, TunedConfig
from adapmoe_lab.records.files import save_json
from adapmoe_lab.simulation.search.prefetch_search import plan_prefetch
from adapmoe_lab.simulation.simulate import replayed_and_timed
from adapmoe_lab.simulation.statistics.rank_agreement import rank_correlation

SHARES = (0.25, 0.375, 0.625, 0.75, 1.0)
PROBED_SHARE = 0.875
"""What the model is loaded with, and the probe decodes in; and half of all experts."""

SKIPPED_FRACTION = 0.2
MEASURED = ("measured_ms", "samples_ms", "used", "wasted", "demands")

EVICTION = "lfu_aged"


@dataclass(frozen=True, eq=False)
class Case:
    """A configuration, and what is varied in it."""

    share: float
    is_gated: bool
    fetches_ahead: bool
    config: TunedConfig

    def __str__(self) -> str:
        """Name what is varied."""
        gated = "gated" if self.is_gated else "all experts"
        return f"{self.share:.1%} cached, {gated}{', ahead' if self.fetches_ahead else ''}"


def cases_of(trace: RoutingTrace) -> list[Case]:
    """Return every configuration: shares cached, gating off and on, prefetch off and on."""
    spec, cases = trace.spec, []
    for share in SHARES:
        plan = slots_plan(spec, round(share * spec.n_experts))
        for gating in (None, UniformCut(trace).table(SKIPPED_FRACTION)):
            plain = replace(TunedConfig.untuned(spec), plan=plan, gating=gating, eviction=EVICTION)
            cases.append(Case(share, gating is not None, False, plain))
            if share < 1:
                table = plan_prefetch(trace, gating=gating, plan=plan, eviction=EVICTION)
                ahead = replace(plain, prefetch=table)
                cases.append(Case(share, gating is not None, True, ahead))
    return cases


def as_measured(trace: RoutingTrace, prompt_tokens: int) -> tuple[RoutingTrace, NDArray[np.bool_]]:
    """Return what a measurement runs, prompts token by token, and which of its tokens count.

    The first sequence comes twice, to warm up. Prompts do not count, nor the last token of each
    sequence, which is produced and not run.
    """
    n_sequences = len(trace.sequence_starts)
    run = trace.of_sequences([0, *range(n_sequences)])
    starts, places = run.sequence_starts, np.arange(run.n_tokens)
    sequence = np.searchsorted(starts, places, side="right") - 1
    is_last = np.isin(places + 1, [*starts, run.n_tokens])
    return run, (sequence > 0) & (places - starts[sequence] >= prompt_tokens) & ~is_last


def predict(
    run: RoutingTrace,
    is_counted: NDArray[np.bool_],
    config: TunedConfig,
    hardware: HardwareProfile,
) -> dict[str, float]:
    """Return means over the tokens that count: milliseconds, and experts used, wasted, demanded."""
    keep = kept_experts(run, config.gating)
    replayed, timeline = replayed_and_timed(run.as_decode(), config, keep, hardware)
    counts = {
        "used_predicted": timeline.used,
        "wasted_predicted": timeline.wasted,
        "demands_predicted": replayed.misses - timeline.used,
    }
    means = {name: float(n[is_counted].sum(axis=1).mean()) for name, n in counts.items()}
    return {"predicted_ms": 1e3 * float(timeline.step_s[is_counted].mean()), **means}


def run_rounds(
    model: LabModel, prompts: list[str], lengths: tuple[int, int], n_rounds: int
) -> Iterator[tuple[list[HardwareProfile], list[dict[str, object]]]]:
    """Probe, predict and measure by turns; after every round yield all so far.

    That is the probes, and a row per configuration. Prompts have the first of the lengths, in
    tokens, and are continued by the second.
    """
    prompt_tokens, new_tokens = lengths
    trace = lab.profile(model, [model.generate(prompt, new_tokens) for prompt in prompts])
    run, is_counted = as_measured(trace, prompt_tokens)
    cases, probes = cases_of(trace), []
    rows: list[dict[str, object]] = [
        {
            "case": str(case),
            "share": case.share,
            "is_gated": case.is_gated,
            "fetches_ahead": case.fetches_ahead,
            **{name: [] for name in MEASURED},
        }
        for case in cases
    ]
    predictions: list[list[dict[str, float]]] = []

    def probe() -> None:
        probes.append(lab.probe_hardware(model))
        predictions.append([predict(run, is_counted, case.config, probes[-1]) for case in cases])

    probe()
    for number in range(n_rounds):
        for case, row in zip(cases, rows, strict=True):
            config = replace(case.config, hardware=probes[-1])
            report = lab.measure_latency(
                model, config, prompts, new_tokens=new_tokens, repeats=1,
                max_prompt_tokens=prompt_tokens,
            )  # fmt: skip
            samples, traffic = 1e3 * np.asarray(report.decode.samples), report.decode_traffic
            row["measured_ms"].append(float(np.median(samples)))
            row["samples_ms"].append(samples.tolist())
            for name, counted in (
                ("used", traffic.prefetch_used),
                ("wasted", traffic.prefetch_wasted),
                ("demands", traffic.misses),
            ):
                row[name].append(int(counted.sum()) / traffic.n_steps)
        probe()
        for row, *both in zip(rows, *predictions[-2:], strict=True):
            for name in both[0]:
                mean = float(np.mean([predicted[name] for predicted in both]))
                row.setdefault(name, []).append(mean)
        print(f"round {number + 1} of {n_rounds} done", flush=True)
        yield probes, rows


def judge(rows: list[dict[str, object]]) -> dict[str, float]:
    """Add to every row how far off it is; return how far off they are together.

    Beside how predicted and measured rank the configurations alike stands how the even and the odd
    rounds of the measurement do, which says how well it knows the order itself.
    """
    for row in rows:
        ratios = np.array(row["predicted_ms"]) / np.array(row["measured_ms"])
        row["ratio"] = float(np.median(ratios))
    errors = np.array([abs(row["ratio"] - 1) for row in rows])
    predicted = np.array([np.median(row["predicted_ms"]) for row in rows])
    rounds = np.array([row["measured_ms"] for row in rows])
    measured = np.median(rounds, axis=1)
    verdict = {
        "n": len(rows),
        "median_error": float(np.median(errors)),
        "worst_error": float(errors.max()),
        "rank_correlation": float(rank_correlation(predicted, measured)),
    }
    if rounds.shape[1] > 1:
        even, odd = (np.median(rounds[:, first::2], axis=1) for first in (0, 1))
        verdict["rank_correlation_of_halves"] = float(rank_correlation(even, odd))
    return verdict


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", nargs="+", default=[None], help="links to emulate, on a CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=3, help="texts to continue")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    results, n_prompts = [], arguments.prompts
    for target in arguments.target:
        model = lab.load(
            arguments.model, dtype=arguments.dtype, link=target,
            expert_memory=f"{PROBED_SHARE:.1%}",
        )  # fmt: skip
        texts = lab.calibration_texts()
        prompts = [
            model.tokenizer.decode(model.encode(text)[: arguments.prompt_tokens])
            for text in texts[:: max(1, len(texts) // n_prompts)][:n_prompts]
        ]
        lengths = arguments.prompt_tokens, arguments.new_tokens
        link = model.link.name
        for probes, rows in run_rounds(model, prompts, lengths, arguments.rounds):
            result = {
                "link": link,
                "conditions": measurement_conditions(model),
                "prompts": len(prompts),
                "prompt_tokens": arguments.prompt_tokens,
                "new_tokens": arguments.new_tokens,
                "verdict": judge(rows),
                "rows": rows,
                "probes": [probe.to_json() for probe in probes],
            }
            record = {"benchmark": "predicted_time", "results": [*results, result]}
            save_json(arguments.out, record)
        results.append(result)
        print(f"\n{link}: predicted over measured")
        for row in rows:
            spent = np.median(row["measured_ms"])
            print(f"{row['case']:45} {spent:8.2f} ms  {row['ratio']:.3f}")
        verdict = result["verdict"].items()
        print(", ".join(f"{name} {value:.3f}" for name, value in verdict), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
