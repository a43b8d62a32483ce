"""What this machine has, what runs on it, and which models would fit."""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch

from adapmoe_lab.assets import data_folder
from adapmoe_lab.engine.device import device_name
from adapmoe_lab.engine.memory_plan import HEADROOM, in_words, memory_needs
from adapmoe_lab.models.checkpoint.meta_model import MetaModel, configured_top_k
from adapmoe_lab.models.support import family_class, find_family
from adapmoe_lab.policies.allocation.slots import N_STAGING
from adapmoe_lab.records import PRECISIONS
from adapmoe_lab.records.files import RecordError, fields_of, known_values

PACKAGES = ("adapmoe-lab", "torch", "transformers", "jupyterlab", "ipywidgets", "plotly", "lm-eval")
BFLOAT16_BYTES = 2
COPY_BYTES = 64 * 2**20
N_COPIES = 9


@dataclass(frozen=True)
class KnownModel:
    """Dimensions of a published model, whose experts are three matrices each."""

    name: str
    n_layers: int
    n_experts: int
    top_k: int
    hidden_size: int
    expert_width: int
    total_parameters: float

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in bfloat16."""
        return 3 * self.hidden_size * self.expert_width * BFLOAT16_BYTES

    @property
    def all_experts_bytes(self) -> int:
        """Bytes of every expert in bfloat16."""
        return self.n_layers * self.n_experts * self.expert_bytes

    @property
    def other_bytes(self) -> float:
        """Bytes of everything but the experts, in bfloat16."""
        return self.total_parameters * BFLOAT16_BYTES - self.all_experts_bytes


@dataclass(frozen=True)
class Machine:
    """What was found: device memory is None without CUDA, the copy speed is from pinned memory."""

    device: str
    device_free_bytes: int | None
    host_free_bytes: int
    copy_bytes_per_s: float


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
    return read_known_models(data_folder() / "known_models.json")


def read_known_models(path: Path) -> list[KnownModel]:
    """Return the models of a file.

    Raises:
        RecordError: the file is not a list of models, or a value is unknown or missing.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        models = known_values(document, str(path), ("about", "models"))["models"]
        return [
            KnownModel(**fields_of(KnownModel, model, f"{path}, model {number},"))
            for number, model in enumerate(models, start=1)
        ]
    except RecordError:
        raise
    except (ValueError, TypeError) as error:
        raise RecordError(f"{path} is not a list of known models: {error!r}.") from error


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
    lines += ["", "What would fit, weights in bfloat16:"]
    lines += [_fit(model, machine) for model in known_models()]
    return "\n".join(lines)


@dataclass(frozen=True)
class Fit:
    """What a model's experts take in one precision, and where they would go on a machine.

    Attributes:
        precision: how the experts are stored.
        expert_bytes: bytes of one expert.
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
    n_layers, n_experts = len(model.layers), model.layers[0].n_experts
    top_k = configured_top_k(model.config)
    n_runs = [layer.n_runs for layer in model.layers]
    cpu = machine.device_free_bytes is None
    device = torch.device("cpu" if cpu else "cuda")
    needs = memory_needs(model, top_k, device, context_tokens).total
    host = HEADROOM * machine.host_free_bytes - (needs if cpu else model.other_bytes)
    room = (
        host if machine.device_free_bytes is None else HEADROOM * machine.device_free_bytes - needs
    )
    found = []
    for precision in PRECISIONS:
        sizes = [model.expert_format(layer, precision).n_bytes for layer in range(n_layers)]
        one, every = max(sizes), n_experts * sum(sizes)
        chosen = top_k * int(np.dot(n_runs, sizes))  # bytes of a token's experts
        left = room - (every if cpu and 2 * every <= host else 0)  # the store lies there too
        slots = min(n_layers * n_experts, left // one - N_STAGING if left < every else left // one)
        found.append(
            Fit(
                precision=precision,
                expert_bytes=one,
                all_experts_bytes=every,
                device_share=slots / (n_layers * n_experts) if slots >= n_layers else None,
                fits_host=every <= host - (max(0, slots) * one if cpu else 0),
                most_s_per_token=chosen / machine.copy_bytes_per_s,
            )
        )
    return found


def model_report(model: MetaModel, machine: Machine, context_tokens: int | None = None) -> str:
    """Return in words what a model would take on a machine."""
    config = model.config
    n_layers, n_experts = len(model.layers), model.layers[0].n_experts
    top_k = configured_top_k(config)
    device = torch.device("cpu" if machine.device_free_bytes is None else "cuda")
    needs = memory_needs(model, top_k, device, context_tokens)
    particulars = find_family(config.model_type).described()
    lines = [
        f"{model.name}: {config.model_type}, {n_layers} layers x {n_experts} experts, top-{top_k}",
        f"family: {family_class(config.model_type)}" + "".join(f"; {p}" for p in particulars),
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


def _fit(model: KnownModel, machine: Machine) -> str:
    host = machine.host_free_bytes * HEADROOM
    line = f"  {model.name:17} {model.all_experts_bytes / 2**30:6.1f} GiB of experts: "
    if machine.device_free_bytes is None:
        needed = model.all_experts_bytes + model.other_bytes
        return line + ("fits host memory" if needed <= host else "does not fit host memory")
    if model.all_experts_bytes > host:
        return line + "does not fit host memory"
    room = machine.device_free_bytes * HEADROOM - model.other_bytes
    share = min(1.0, room / model.all_experts_bytes)
    if share <= 0:
        return line + "what is not experts does not fit the GPU"
    load_ms = 1e3 * model.expert_bytes / machine.copy_bytes_per_s
    return line + f"{share:.0%} of them on the GPU at once; loading one takes {load_ms:.2f} ms"


def _copy_speed(device: torch.device) -> float:
    """Return bytes per second of a copy from (pinned) host memory, the median of a few."""
    on_gpu = device.type == "cuda"
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.empty_like(source, device=device)
    seconds = []
    for _ in range(N_COPIES):
        start = time.perf_counter()
        target.copy_(source)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return COPY_BYTES / float(np.median(seconds))
