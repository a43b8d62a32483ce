"""A probe of the machine: what a decode step and a copy of an expert cost here."""

from __future__ import annotations

import numpy as np
import torch

from adapmoe_lab.engine.device import device_name
from adapmoe_lab.engine.loading import LabModel
from adapmoe_lab.engine.pace import decode_step_times
from adapmoe_lab.records import GatingTable, HardwareProfile

COPY_FRACTIONS = (0.125, 0.25, 0.5, 1.0)


def probe_hardware(
    model: LabModel, *, n_steps: int = 24, rounds: int = 3, copies: int = 12
) -> HardwareProfile:
    """Measure the parts of a decode step on this machine.

    Decode is timed with every expert resident, once with all K experts per token and once with
    one, in turn; the difference is the cost of an expert, the rest that of everything else.
    Copies are timed over the model's own link, from an expert's row to a slot.

    Args:
        model: the model to run; its configuration is restored afterwards.
        n_steps: decode steps timed per round.
        rounds: rounds of each kind.
        copies: copies timed per size.
    """
    spec, engine = model.spec, model.engine
    one_expert = GatingTable.per_layer(np.zeros(spec.n_layers), spec.top_k)
    samples: dict[int, list[float]] = {spec.top_k: [], 1: []}
    with model.running(), engine.unpaced():
        for _ in range(rounds):
            for n_kept, table in ((spec.top_k, None), (1, one_expert)):
                engine.configure(table, model.memory.slots)
                decode_step_times(model.hf, engine, n_steps)  # loads what the same steps need next
                samples[n_kept].extend(decode_step_times(model.hf, engine, n_steps))
    full_s, single_s = np.median(samples[spec.top_k]), np.median(samples[1])
    dropped = spec.n_layers * max(1, spec.top_k - 1)
    expert_s = max(0.0, float(full_s - single_s)) / dropped
    dense_step_s = max(0.0, float(full_s) - expert_s * spec.n_layers * spec.top_k)
    sizes, times = _copy_times(model, copies)
    return HardwareProfile(
        device=device_name(engine.device),
        link=engine.link.name,
        copy_bytes=sizes,
        copy_s=times,
        dense_step_s=dense_step_s,
        expert_s=expert_s,
        conditions=measurement_conditions(model),
    )


def measurement_conditions(model: LabModel) -> dict[str, str | int]:
    """Return what every timing of a model depends on, beside its configuration."""
    return {
        "model": model.spec.fingerprint(),
        "dtype": model.spec.dtype,
        "device": device_name(model.engine.device),
        "link": model.engine.link.name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _copy_times(model: LabModel, copies: int) -> tuple[list[int], list[float]]:
    """Return sizes in bytes and the median seconds of a waited-for copy of each."""
    engine = model.engine
    n_experts = engine.store.n_experts(0)
    n_bytes = min(layout.n_bytes for layout in engine.store.formats[0])
    target = torch.empty(n_bytes, dtype=torch.uint8, device=engine.device)
    sizes, times = [], []
    for fraction in COPY_FRACTIONS:
        size = max(1, int(n_bytes * fraction))
        samples = []
        for turn in range(copies + 2):
            source = engine.store.row(0, turn % n_experts)[:size]
            start = engine.clock.now()
            engine.link.wait(engine.link.copy(source, target[:size]))
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)
            samples.append(engine.clock.now() - start)
        sizes.append(size)
        times.append(float(np.median(samples[2:])))
    return sizes, times
