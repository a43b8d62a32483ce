"""What this machine has, what runs on it, and which models would fit."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import psutil
import torch

from adapmoe_lab.assets import data_folder
from adapmoe_lab.engine.device import device_name
from adapmoe_lab.engine.graph.requirements import check_computing, reason_of
from adapmoe_lab.engine.memory_plan import (
    HEADROOM,
    FreeMemory,
    MemoryNeeds,
    in_words,
    memory_needs,
    plan_memory,
)
from adapmoe_lab.engine.store.builder import expert_formats
from adapmoe_lab.models.capturable import capture_in_words
from adapmoe_lab.models.checkpoint.meta_model import MetaModel, configured_top_k, describe
from adapmoe_lab.models.support import family_class, find_family
from adapmoe_lab.profiling.hardware.machine_times import interleaved_medians, seconds_each
from adapmoe_lab.records import PRECISIONS, MoESpec
from adapmoe_lab.records.known_models import KnownModel, load_known_models

PACKAGES = ("adapmoe-lab", "torch", "transformers", "jupyterlab", "ipywidgets", "plotly", "lm-eval")
COPY_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Machine:
    """What was found: device memory is None without CUDA, the copy speed is from pinned memory."""

    device: str
    device_free_bytes: int | None
    host_free_bytes: int
    copy_bytes_per_s: float

    @property
    def device_kind(self) -> torch.device:
        """Where models would compute."""
        return torch.device("cpu" if self.device_free_bytes is None else "cuda")

    @property
    def free(self) -> FreeMemory:
        """What is free, as a memory plan asks."""
        on_device = self.device_free_bytes
        return FreeMemory(
            self.host_free_bytes if on_device is None else on_device, self.host_free_bytes
        )


def examine() -> Machine:
    """Look at this machine and time a few copies; takes about a second."""
    free = psutil.virtual_memory().available
    if not torch.cuda.is_available():
        cpu = torch.device("cpu")
        return Machine(device_name(cpu), None, free, _copy_speed(cpu))
    gpu = torch.device("cuda")
    device_free, _ = torch.cuda.mem_get_info(gpu)
    return Machine(device_name(gpu), device_free, free, _copy_speed(gpu))


def known_models() -> list[KnownModel]:
    """Return the published models that fit is judged for."""
    return load_known_models(data_folder() / "known_models.json")


def report(machine: Machine) -> str:
    """Return the findings in words."""
    gib = 2**30
    lines = [f"{name:14} {version(name)}" for name in PACKAGES]
    lines += [f"{'python':14} {platform.python_version()}", "", f"compute        {machine.device}"]
    lines.append(f"host memory    {machine.host_free_bytes / gib:.1f} GiB free")
    speed = f"{machine.copy_bytes_per_s / 1e9:.1f} GB/s"
    if machine.device_free_bytes is None:
        lines += [
            "GPU            none: torch sees no CUDA device",
            f"link           none; a copy in host memory runs at {speed}",
            "",
            "Without a GPU the engine computes on the CPU. Experts are really copied, and each",
            "copy is held as long as a named target link would take; results say 'emulated'.",
        ]
    else:
        lines += [
            f"GPU memory     {machine.device_free_bytes / gib:.1f} GiB free",
            f"link           {speed} from pinned host memory",
        ]
    if importlib.util.find_spec("triton") is None:
        lines.append("Triton         not installed, not needed: experts run as torch products")
    lines.append(f"graphs         {_graphs(machine.device_kind)}")
    lines += ["", "What would fit, weights in bfloat16:"]
    lines += [_known_fit(model, machine) for model in known_models()]
    return "\n".join(lines)


@dataclass(frozen=True)
class Fit:
    """What a model's experts take in one precision, and where they would go on a machine.

    Attributes:
        precision: how the experts are stored.
        expert_bytes: bytes of one expert, the widest.
        all_experts_bytes: bytes of all of them.
        device_share: the share of experts that have a slot at once, 0 to 1; None if what is not
            experts leaves no room for one per layer.
        fits_host: whether host memory holds all experts; if not they stay on disk.
        most_s_per_token: seconds of loading per token if every expert has to be loaded.
    """

    precision: str
    expert_bytes: int
    all_experts_bytes: int
    device_share: float | None
    fits_host: bool
    most_s_per_token: float

    @property
    def likely_s_per_token(self) -> float:
        """Seconds of loading per token if experts were chosen evenly and kept at random."""
        return self.most_s_per_token * (1.0 - (self.device_share or 0.0))


def fits(model: MetaModel, machine: Machine, context_tokens: int | None = None) -> list[Fit]:
    """Return what a model's experts take in every precision, from its configuration alone."""
    top_k = configured_top_k(model.config)
    needs = memory_needs(model, top_k, machine.device_kind, context_tokens)
    n_runs = [layer.n_runs for layer in model.layers]
    return [
        _fit(describe(model, expert_formats(model, precision)), needs, machine, n_runs)
        for precision in PRECISIONS
    ]


def _fit(spec: MoESpec, needs: MemoryNeeds, machine: Machine, n_runs: Sequence[int]) -> Fit:
    """Return where the memory plan would put a model whose layers run so often for each token."""
    try:
        plan = plan_memory(spec, needs, machine.device_kind, free=machine.free)
    except (MemoryError, ValueError):
        share, fits_host = None, spec.all_experts_bytes <= HEADROOM * machine.host_free_bytes
    else:
        share, fits_host = plan.slots.n_slots / spec.stored_bytes.size, plan.fits_host
    return Fit(
        precision=spec.precision.name or str(spec.precision),
        expert_bytes=spec.stored_expert_bytes,
        all_experts_bytes=spec.all_experts_bytes,
        device_share=share,
        fits_host=fits_host,
        most_s_per_token=spec.top_k
        * float(np.dot(n_runs, spec.slot_bytes))
        / machine.copy_bytes_per_s,
    )


def model_report(model: MetaModel, machine: Machine, context_tokens: int | None = None) -> str:
    """Return in words what a model would take on a machine."""
    config = model.config
    n_layers, n_experts = len(model.layers), model.layers[0].n_experts
    top_k = configured_top_k(config)
    needs = memory_needs(model, top_k, machine.device_kind, context_tokens)
    particulars = find_family(config.model_type).described()
    lines = [
        f"{model.name}: {config.model_type}, {n_layers} layers x {n_experts} experts, top-{top_k}",
        f"family: {family_class(config.model_type)}" + "".join(f"; {p}" for p in particulars),
        f"decode steps as a CUDA graph: {capture_in_words(config.model_type)}",
        f"beside the experts, in {model.dtype}: {needs}",
        "",
        f"{'experts in':10} {'one':>9} {'all':>9} {'slots':>6} {'rest':>7} "
        f"{'ms/token of loads':>18}",
    ]
    for fit in fits(model, machine, context_tokens):
        share = "none" if fit.device_share is None else f"{fit.device_share:.0%}"
        place = "memory" if fit.fits_host else "disk"
        times = f"{1e3 * fit.likely_s_per_token:.1f} to {1e3 * fit.most_s_per_token:.1f}"
        lines.append(
            f"{fit.precision:10} {in_words(fit.expert_bytes):>9} "
            f"{in_words(fit.all_experts_bytes):>9} {share:>6} {place:>7} {times:>18}"
        )
    link = f"{machine.copy_bytes_per_s / 1e9:.1f} GB/s"
    lines += [
        "",
        f"slots: experts that have room on {machine.device} at once; rest: where the others wait.",
        f"ms/token of loads, over {link}: with experts chosen evenly, and with every one missing. "
        "Real text repeats itself, so the cache does better; experts on disk are read at the "
        "disk's rate instead.",
    ]
    return "\n".join(lines)


def _known_fit(model: KnownModel, machine: Machine) -> str:
    """Return a line on a published model, nothing but whose weights is counted."""
    needs = MemoryNeeds(model.other_bytes, kv_cache=0, work=0, context_tokens=0, batch_size=1)
    fit = _fit(model.spec, needs, machine, [1] * model.n_layers)
    line = f"  {model.name:17} {fit.all_experts_bytes / 2**30:6.1f} GiB of experts: "
    if machine.device_free_bytes is None:
        fits_host = fit.fits_host or fit.device_share == 1
        return line + ("fits host memory" if fits_host else "does not fit host memory")
    if not fit.fits_host:
        return line + "does not fit host memory"
    if fit.device_share is None:
        return line + "the GPU has no room for one of each layer beside the rest"
    load_ms = 1e3 * fit.expert_bytes / machine.copy_bytes_per_s
    return line + (
        f"{fit.device_share:.0%} of them on the GPU at once; loading one takes {load_ms:.2f} ms"
    )


def _graphs(device: torch.device) -> str:
    """Say whether a decode step can be a captured graph, or why the host drives it."""
    try:
        check_computing(device, "bfloat16")
    except ValueError as error:
        return f"none, steps are driven by the host: {reason_of(error)}"
    return "a decode step can be one CUDA graph, with executor='auto'"


def _copy_speed(device: torch.device) -> float:
    """Return bytes per second of a copy from (pinned) host memory, the median of a few."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device)
    copy = {"copy": lambda: seconds_each([lambda: target.copy_(source)], device)}
    return COPY_BYTES / interleaved_medians(copy)["copy"]
