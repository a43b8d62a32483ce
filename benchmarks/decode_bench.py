"""What all rows of `decode.py` share: weights, text, clock, and the least a step can take."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from given_routing import GivenText
from numpy.typing import NDArray
from stock_decoding import implementation
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import adapmoe_lab as lab
from adapmoe_lab.assets import demo_folder
from adapmoe_lab.engine.executor import Decoder
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.models.families import find_moe_layers
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.records import TunedConfig

SHARED = {"vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False}
GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", {
        "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8,
    }),
    "qwen3": ("qwen3_moe", {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    }),
    "mixtral": ("mixtral", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }),
    "tiny": ("mixtral", {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }),
}  # fmt: skip
"""Family and configuration; of Qwen3-30B half of its layers, of Mixtral a quarter."""

N_PROMPT, N_WARM, N_TIMED = 32, 10, 64
CONTEXT_TOKENS = 512
ROUTER_SCALE = 0.05
"""Standard deviation of the routers' weights, with which they prefer some experts clearly."""

ROOM = 1.2
"""Bytes that must be free for a checkpoint, over its own."""


class Counts(NamedTuple):
    """Experts that were missed and run so far, and bytes that were fetched."""

    misses: int
    n_run: int
    moved_bytes: int


@dataclass(frozen=True, eq=False)
class Steps:
    """What N steps took and did; those that warm up are left out.

    Attributes:
        seconds: float64 [N].
        misses: int64 [N], experts that each needed and did not find.
        n_run: int64 [N], experts that each ran.
        moved_bytes: int64 [N], bytes of experts brought to the device meanwhile.
        logits: float32 [N, V] on the device.
    """

    seconds: NDArray[np.float64]
    misses: NDArray[np.int64]
    n_run: NDArray[np.int64]
    moved_bytes: NDArray[np.int64]
    logits: torch.Tensor


class Rates(NamedTuple):
    """Bytes per second."""

    link: float
    device: float


class Bench:
    """Everything that rows share: the same weights twice, the text, and the routing in force.

    Attributes:
        stock: the unmodified model, all of it on the device; None once it was given away.
        layers: its layers with experts.
        served: the model whose experts are served.
        text: what is decoded.
        device: where.
        backend: what compiles steps; None for nothing.
    """

    def __init__(
        self, geometry: str, folder: Path, device: torch.device, backend: str | None
    ) -> None:
        """Make the weights, and load them from a checkpoint in `folder`."""
        self.device, self.backend = device, backend
        self.stock: Any = made_model(geometry, device)
        self.layers = find_moe_layers(self.stock)
        save_checkpoint(self.stock, folder)
        free_memory()
        emulated = {} if device.type == "cuda" else {"link": "none"}
        self.served: LabModel = lab.load(
            folder,
            device=device,
            dtype="bfloat16",
            executor="auto",
            max_context_tokens=CONTEXT_TOKENS,
            **emulated,
        )
        self.spec = self.served.spec
        self.text = GivenText(self.spec, N_PROMPT + N_WARM + N_TIMED, device)
        self._leading = ExitStack()
        for layers in (self.layers, self.served.layers):
            routers = [layer.router.module for layer in layers]
            self._leading.enter_context(self.text.leading(routers))
        self._exact: dict[str, torch.Tensor] = {}
        self.rates = measured_rates(device)

    def close(self) -> None:
        """Let go of both models."""
        self._leading.close()
        self.served.close()

    @property
    def n_chosen(self) -> int:
        """Experts that a token's routers choose, in all layers."""
        return self.spec.n_layers * self.spec.top_k

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of weights that every token reads, beside experts: all but the embeddings."""
        return sum(
            parameter.numel() * parameter.element_size()
            for name, parameter in self.served.hf.named_parameters()
            if "embed_tokens" not in name and ".experts" not in name
        )

    def plan_config(self, share: float) -> TunedConfig:
        """Return a config with the same share of every layer's experts in slots."""
        plan = slots_plan(self.spec, round(share * self.spec.n_experts))
        return replace(TunedConfig.untuned(self.spec), plan=plan)

    def served_counts(self) -> Counts:
        """Return what the served model has counted."""
        traffic = self.served.engine.traffic
        misses = traffic.misses.sum() + traffic.prefetch_used.sum()
        return Counts(int(misses), traffic.kept, traffic.bytes_moved)

    @torch.no_grad()
    def run(
        self, decoder: Decoder, counts: Callable[[], Counts] | None = None, n_timed: int = N_TIMED
    ) -> Steps:
        """Decode the text and time every step; without counts nothing is missed."""
        n_warm = N_WARM if n_timed == N_TIMED else 1
        if counts is None:
            counts = lambda: Counts(0, len(seconds) * self.n_chosen, 0)  # noqa: E731
        seconds: list[float] = []
        logits, counted = [], []
        self.text.position.zero_()
        decoder.prefill(self.text.ids[:N_PROMPT])
        for number, token in enumerate(self.text.ids[N_PROMPT:][: n_warm + n_timed].tolist()):
            self.text.position.fill_(N_PROMPT + number)
            counted.append(counts())
            wait_for(self.device)
            start = time.perf_counter()
            found = decoder.step(token)
            wait_for(self.device)
            seconds.append(time.perf_counter() - start)
            logits.append(found.float().clone())
        counted.append(counts())
        per_step = np.diff(np.array(counted), axis=0)[n_warm:]
        return Steps(np.array(seconds[n_warm:]), *per_step.T, torch.stack(logits[n_warm:]))

    @torch.no_grad()
    def exact_logits(self) -> torch.Tensor | None:
        """Return the logits [W+N, V] in float32 of every step under the routing in force.

        None where the routers choose, which rounding may lead elsewhere.
        """
        routing = self.text.routing
        if routing is None:
            return None
        if routing.name not in self._exact:
            with torch.device(self.device):
                exact = AutoModelForCausalLM.from_config(self.stock.config, dtype=torch.float32)
            exact.eval().load_state_dict(self.stock.state_dict())
            routers = [layer.router.module for layer in find_moe_layers(exact)]
            with implementation(exact, "eager"), self.text.leading(routers):
                self.text.position.zero_()
                logits = exact(self.text.ids[None].to(self.device)).logits[0]
            self._exact[routing.name] = logits[N_PROMPT:].clone()
            del exact, logits
            free_memory()
        return self._exact[routing.name]

    def limits_s(self, steps: Steps) -> np.ndarray:
        """Return what each step takes at least, float64 [N]."""
        expert_bytes = self.spec.mean_expert_bytes
        read = np.maximum(0, steps.n_run - steps.misses) * expert_bytes + self.dense_bytes
        return np.maximum(read / self.rates.device, steps.misses * expert_bytes / self.rates.link)


def made_model(geometry: str, device: torch.device) -> Any:
    """Return a model of random weights."""
    family, sizes = GEOMETRIES[geometry]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHARED, **sizes})
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for layer in find_moe_layers(model):
        layer.router.module.weight.data.normal_(0, ROUTER_SCALE)  # pyright: ignore
    return model


def save_checkpoint(model: Any, folder: Path) -> None:
    """Write a model, with the demo's tokenizer, which nothing is decoded by."""
    model.save_pretrained(folder)
    for file in demo_folder().glob("*token*"):
        shutil.copy(file, folder)


@contextmanager
def checkpoint_folder(geometry: str, parent: Path | None) -> Iterator[Path]:
    """Yield a temporary folder with room for a checkpoint, in memory if there is."""
    family, sizes = GEOMETRIES[geometry]
    with torch.device("meta"):
        config = AutoConfig.for_model(family, **{**SHARED, **sizes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    needed = int(ROOM * sum(p.numel() * p.element_size() for p in model.parameters()))
    parents = [parent] if parent is not None else [Path("/dev/shm"), Path(tempfile.gettempdir())]  # noqa: S108
    free = {path: shutil.disk_usage(path).free for path in parents if path.is_dir()}
    place = next((path for path, n_bytes in free.items() if n_bytes >= needed), None)
    if place is None:
        found = ", ".join(f"{path} has {n / 2**30:.1f} GiB" for path, n in free.items())
        raise OSError(
            f"The checkpoint needs {needed / 2**30:.1f} GiB; {found or 'there is no such folder'}. "
            "Name a folder with room by --folder."
        )
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


def measured_rates(device: torch.device, n_bytes: int = 2**31) -> Rates:
    """Measure a pinned copy to the device, and the fastest read of device memory."""
    if device.type != "cuda":
        n_bytes //= 1024
    columns = 4096
    pinned = torch.empty(n_bytes // 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(pinned, device=device)
    matrix = torch.zeros((n_bytes // 2 // columns, columns), dtype=torch.bfloat16, device=device)
    vector = torch.zeros(1, columns, dtype=torch.bfloat16, device=device)
    link = len(pinned) / best_s(lambda: target.copy_(pinned, non_blocking=True), device)
    product = best_s(lambda: nn.functional.linear(vector, matrix), device)
    total = best_s(lambda: matrix.view(torch.int32).amax(), device)
    return Rates(link, n_bytes / min(product, total))


def best_s(function: Callable[[], Any], device: torch.device, n_runs: int = 10) -> float:
    """Return the seconds of the fastest run of a function."""
    seconds = []
    for _ in range(n_runs):
        wait_for(device)
        start = time.perf_counter()
        function()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_memory() -> None:
    """Give device memory back that nothing holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
