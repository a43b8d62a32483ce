"""A probe of the machine: what the parts of a decode step and a copy of an expert cost here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import torch

from adapmoe_lab.engine.device import device_name
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.transfer.link import NO_LINK, EmulatedLink
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.models.experts import run_expert
from adapmoe_lab.models.families import check_each_runs_once
from adapmoe_lab.profiling.hardware.machine_times import (
    CopyTimes,
    copy_times,
    expert_times,
    host_rates,
    interleaved_medians,
    seconds_each,
    sync_and_launch_s,
)
from adapmoe_lab.profiling.hardware.replayed_steps import (
    is_replayed,
    replayed_decodes,
    with_misses,
)
from adapmoe_lab.profiling.hardware.solved_costs import TimedStep, replayed_costs, solved_costs
from adapmoe_lab.profiling.hardware.timed_steps import (
    host_driven,
    throttled_steps,
    unthrottled_steps,
)
from adapmoe_lab.records import HardwareProfile, TunedConfig
from adapmoe_lab.records.hardware import mean_expert_s
from adapmoe_lab.simulation.timing.timeline import counted_replay, run_timeline

THROTTLED_S = 5.0
"""Most seconds, about, of decoding over a throttled link."""
DECODE_S, LEAST_ROUNDS = 10.0, 3
"""No further round of decoding begins after so many seconds, if there were that many."""


def probe_hardware(model: LabModel, *, n_steps: int = 24, rounds: int = 6) -> HardwareProfile:
    """Measure the parts of a decode step on this machine, in less than 20 s.

    Decode runs in the memory the model was loaded with, its steps in interleaved variants: as it
    is, under a gate that keeps every expert, and under one that keeps one; each with no predictor
    queried, with one, with several at once, and with one at a layer's output. What each adds is its
    cost, the rest that of everything else; misses are counted and taken out. It also runs with half
    of the experts cached over the link as it is, for what waiting adds. Everything else is timed by
    itself, interleaved, and its median taken.

    Args:
        model: the model to run; its configuration is restored afterwards.
        n_steps: decode steps timed per round.
        rounds: rounds of decoding, fewer on a machine that is slow at them.

    Where steps are captured graphs, they are timed as they are replayed, at several numbers of
    misses and of experts run: what the host does is no part of them, and a miss takes what the
    device takes to read it over the link.

    Raises:
        UnsupportedModelError: some layers run several times for each token.
        ValueError: captured steps were asked for, and the host runs them in their place.
    """
    check_probed(model)
    if is_replayed(model):
        return _probe_replayed(model, n_steps, rounds)
    spec, engine = model.spec, host_driven(model)
    hidden = torch.ones(1, spec.hidden_size, dtype=model.hf.dtype, device=engine.device)
    hidden = hidden / spec.hidden_size
    stored = {layout.precision: layout for layer in model.store.formats for layout in layer}
    sync_s, launch_s = None, None
    if engine.device.type == "cuda":
        sync_s, launch_s = sync_and_launch_s(engine.device)
    memory_rate, matmul_rate = host_rates(model.hf.dtype)
    with model.running(TunedConfig.untuned(spec)):
        layer_host_s = _layer_host_s(model, hidden)
        host_copy_s, miss_s = _host_miss_s(model, hidden)
        engine.release()
        copies = copy_times(model.store, model.link, engine.clock, engine.device)
        by_precision = expert_times(model.layers[0].experts, list(stored.values()), hidden)
        n_throttled = _n_throttled(model, copies.linked[-1], n_steps, rounds)
        free, throttled = _decoded(model, n_steps, n_throttled, rounds)
    alone_s = mean_expert_s(by_precision, spec.precision.counts)
    profile = _profile(
        model,
        copies,
        expert_s_by_precision=by_precision,
        layer_host_s=layer_host_s,
        host_copy_s=host_copy_s,
        miss_s=miss_s,
        host_sync_s=sync_s,
        launch_s=launch_s,
        host_memory_bytes_per_s=memory_rate,
        host_matmul_bytes_per_s=matmul_rate,
        **solved_costs(free, miss_s, alone_s),
    )
    return replace(profile, wait_s=_wait_s(throttled, profile, model) if throttled else None)


def check_probed(model: LabModel) -> None:
    """Refuse a model whose steps cannot be timed, as `probe_hardware` does."""
    check_each_runs_once(model.layers)
    if not is_replayed(model):
        host_driven(model)


def _probe_replayed(model: LabModel, n_steps: int, rounds: int) -> HardwareProfile:
    """Measure the parts of a step that is replayed, and copies over the link."""
    engine, decodes = model.engine, []
    with model.running(TunedConfig.untuned(model.spec)):
        for _ in _timed_rounds(rounds):
            decodes += replayed_decodes(model, n_steps)
        engine.release()
        copies = copy_times(model.store, model.link, engine.clock, engine.device)
    check_probed(model)  # the first decode may have found that they cannot be captured
    costs, miss_s = replayed_costs(decodes)
    profile = _profile(model, copies, **costs)
    if miss_s:
        read_s = profile.copy_s * (miss_s / profile.load_s(model.spec.mean_expert_bytes))
        profile = replace(profile, copy_s=read_s)
    missing = with_misses(decodes)
    return replace(profile, wait_s=_wait_s(missing, profile, model) if missing else None)


def _profile(model: LabModel, copies: CopyTimes, **costs: Any) -> HardwareProfile:
    """Return the profile of the machine that a model runs on, with its copies and other costs."""
    return HardwareProfile(
        device=device_name(model.engine.device),
        link=model.link.name,
        copy_bytes=np.array(copies.sizes),
        copy_s=np.array(copies.linked),
        conditions=measurement_conditions(model),
        pageable_copy_s=None if copies.pageable is None else np.array(copies.pageable),
        **costs,
    )


def _timed_rounds(rounds: int) -> Iterator[int]:
    """Yield the rounds of decoding that there is time for."""
    end = time.monotonic() + DECODE_S
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.monotonic() > end:
            return
        yield number


def _decoded(
    model: LabModel, n_steps: int, n_throttled: int, rounds: int
) -> tuple[list[list[TimedStep]], list[TimedStep]]:
    """Return the steps of every decode over a link that holds nothing, and those over the link."""
    free, throttled = [], []
    for _ in _timed_rounds(rounds):
        for _ in range(2):
            free.append(unthrottled_steps(model, n_steps, first=len(free)))
        throttled += throttled_steps(model, n_throttled) if n_throttled else []
    return free, throttled


def _n_throttled(model: LabModel, load_s: float, n_steps: int, rounds: int) -> int:
    """Return the steps that a round over a throttled link has time for; 0 where it is not."""
    if model.link.name == NO_LINK:
        return 0
    step_s = max(1e-6, model.spec.n_layers * load_s)
    return int(np.clip(THROTTLED_S / rounds / step_s, 2, n_steps))


def _wait_s(steps: list[TimedStep], hardware: HardwareProfile, model: LabModel) -> float:
    """Return what a layer that waited took beyond what the cost model says; the median of steps."""
    counts = [np.stack([getattr(step, name) for step in steps]) for name in ("hits", "misses")]
    costs = hardware.step_costs(model.spec.precision)
    timeline = run_timeline(counted_replay(*counts), costs)
    n_waits = (timeline.stall_s > 0).sum(axis=1)
    rest = np.array([step.seconds for step in steps]) - timeline.step_s
    has_waited = n_waits > 0
    if not has_waited.any():
        return 0.0
    return float(np.median(rest[has_waited] / n_waits[has_waited]))


@torch.no_grad()
def _layer_host_s(model: LabModel, hidden: torch.Tensor) -> float | None:
    """Return what a layer takes around K resident experts; None if it has no room for them."""
    engine, top_k = host_driven(model), model.spec.top_k
    if model.memory.slots.slots[0] < top_k:
        return None
    engine.configure(None, model.memory.slots)
    module = model.layers[0].experts
    index = torch.arange(top_k, device=hidden.device)[None]
    weights = torch.full(index.shape, 1 / top_k, dtype=hidden.dtype, device=hidden.device)

    def layer() -> object:
        return engine.run_layer(0, module, hidden, index, weights)

    with model.link.without_link_delay():
        layer()
        resident = [
            found for _, found in engine.fetch_experts(0, range(top_k), hidden)
        ]  # hits stay
        medians = interleaved_medians(
            {
                "layer": lambda: seconds_each([layer] * 8, hidden.device, engine.clock),
                "experts": lambda: seconds_each(
                    [
                        lambda found=found: run_expert(module, found, hidden)
                        for found in resident * 8
                    ],
                    hidden.device,
                    engine.clock,
                ),
            },
            budget_s=0.5,
        )
    return max(0.0, medians["layer"] - top_k * medians["experts"])


def _host_miss_s(
    model: LabModel, hidden: torch.Tensor
) -> tuple[float, float | None] | tuple[None, None]:
    """Return the seconds of one copy in host memory, and of all that a miss adds there.

    Each layer runs resident experts and as many missing ones, interleaved, over a link without
    delay. The second is None where there are too few experts or slots for that, both where the link
    is real.
    """
    engine, spec, store = host_driven(model), model.spec, model.store
    if not isinstance(model.link, EmulatedLink):
        return None, None
    n_run = min(spec.top_k, spec.n_experts // 2, int(model.memory.slots.slots.min()))
    engine.configure(None, replace(model.memory.slots, slots=np.full(spec.n_layers, n_run)))
    target = torch.empty(int(store.expert_bytes.max()), dtype=torch.uint8)
    copied = cycle(store.numbers())
    sets = cycle([range(n_run), range(n_run, 2 * n_run)])
    wanted = next(sets)

    def copy() -> None:
        row = store.buffer(*next(copied))
        model.link.copy(row, target[: row.numel()])

    def run(layer: int) -> None:
        for _, weights in engine.fetch_experts(layer, wanted, hidden):
            run_expert(model.layers[layer].experts, weights, hidden)  # faster for being just copied

    def running(is_missing: bool) -> float:
        nonlocal wanted
        wanted = next(sets) if is_missing else wanted
        runs = [lambda layer=layer: run(layer) for layer in range(spec.n_layers)]
        return seconds_each(runs, engine.device, engine.clock)

    works = {"copy": lambda: seconds_each([copy] * spec.n_layers, engine.device, engine.clock)}
    if n_run:
        works |= {"missing": lambda: running(True), "hitting": lambda: running(False)}
    with model.link.without_link_delay():
        medians = interleaved_medians(works, budget_s=1.0)
    if not n_run:
        return medians["copy"], None
    return medians["copy"], max(0.0, medians["missing"] - medians["hitting"]) / n_run
