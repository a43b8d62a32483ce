"""What was fetched ahead in real time, against a replay of the same run's routing.

`python benchmarks/prefetch_counters.py --out benchmarks/results/prefetch-counters.json`

The machine is probed, then the demo model continues prompts over emulated links. What is worth
fetching is weighed by the probe's times in the run and in the replay alike; how much of it begins
depends on how long everything takes. The routing is recorded in a second run of the same prompts,
without fetching ahead, so that recording takes no time of the first; what is demanded in it must be
the same exactly.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

import adapmoe_lab as lab
from adapmoe_lab.engine.generation.tokens import generate_tokens
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.profiling.routing.recorder import RoutingRecorder
from adapmoe_lab.records import RoutingTrace, Traffic, TunedConfig
from adapmoe_lab.records.files import save_json
from adapmoe_lab.simulation.replay.recorded_candidates import recorded_candidates
from adapmoe_lab.simulation.replay.replay import replay
from adapmoe_lab.simulation.search.prefetch_search import plan_prefetch
from adapmoe_lab.simulation.timing.timeline import run_timeline

TARGETS = ("mixtral-8x7b-int4/pcie4-x16", "olmoe-bf16/pcie5-x16")
"""Links on which fetching ahead may pay."""
SLOTS = (2, 4, 6)
EVICTION = "lfu_aged"
PROMPT_TOKENS = 16


def run(model: LabModel, config: TunedConfig, prompts: list[torch.Tensor], n_new: int) -> Traffic:
    """Continue every prompt under a config; return the traffic."""
    with model.running(config):
        for prompt in prompts:
            list(generate_tokens(model.decoder(), prompt, n_new))
        return model.engine.traffic


def recorded(
    model: LabModel, config: TunedConfig, prompts: list[torch.Tensor], n_new: int
) -> tuple[RoutingTrace, Traffic]:
    """Do the same while recording, without fetching ahead; return the trace and the traffic."""
    recorder = RoutingRecorder(model)
    with recorder.recording():
        traffic = run(model, replace(config, prefetch=None), prompts, n_new)
    return recorder.trace(), traffic


def replayed(trace: RoutingTrace, config: TunedConfig, model: LabModel) -> tuple[int, int, int]:
    """Return the demands without fetching ahead, and what is used and wasted with it."""
    keep = kept_experts(trace, None)
    candidates = recorded_candidates(trace, config.prefetch)
    outcome = replay(trace, keep, config.plan, config.eviction, candidates)
    costs = config.hardware.step_costs(model.spec.precision)
    timeline = run_timeline(outcome, costs, candidates, config.prefetch.buffer_slots)
    return int(outcome.misses.sum()), *(
        int(counted.sum()) for counted in (timeline.used, timeline.wasted)
    )


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=48)
    arguments = parser.parse_args()
    texts, results = lab.calibration_texts(), []
    for target in TARGETS:
        model = lab.load("demo", dtype="float32", link=target)
        known = lab.profile(model, texts[: len(texts) // 2])
        prompts = [model.encode(text)[:PROMPT_TOKENS] for text in texts[-arguments.prompts :]]
        rows = []
        for slots in SLOTS:
            plan = slots_plan(model.spec, slots)
            table = plan_prefetch(known, plan=plan, eviction=EVICTION)
            config = replace(
                TunedConfig.untuned(model.spec), plan=plan, eviction=EVICTION, prefetch=table
            )
            config = replace(config, hardware=lab.probe_hardware(model))
            traffic = run(model, config, prompts, arguments.new_tokens)
            trace, demanded = recorded(model, config, prompts, arguments.new_tokens)
            demands, used, wasted = replayed(trace, config, model)
            row = {
                "slots": slots,
                "n_steps": traffic.n_steps,
                "demands": int(demanded.misses.sum()),
                "demands_replayed": demands,
                "used": int(traffic.prefetch_used.sum()),
                "used_replayed": used,
                "wasted": int(traffic.prefetch_wasted.sum()),
                "wasted_replayed": wasted,
            }
            rows.append(row)
            print(f"{target}, {slots} slots: {row}", flush=True)
        for name in ("used", "wasted"):
            counted, expected = (sum(row[n] for row in rows) for n in (name, f"{name}_replayed"))
            print(f"{target}: {name} {counted}, replayed {expected}", flush=True)
        results.append({"link": target, "conditions": measurement_conditions(model), "rows": rows})
    save_json(arguments.out, {"benchmark": "prefetch_counters", "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
