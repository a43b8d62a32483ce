"""Loading a checkpoint with plain transformers, and telling which weights it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from adapmoe_lab.assets import demo_folder
from adapmoe_lab.models.families import MoELayer
from adapmoe_lab.records import MoESpec

HFModel = PreTrainedModel
"""The type of a transformers model, for annotations on the floors above."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_checkpoint(name: str | Path) -> str:
    """Return what transformers should load for a name: the demo's folder, a folder or a hub id.

    Raises:
        FileNotFoundError: the name looks like a folder that is not there, or holds no model.
    """
    if name == "demo":
        name = demo_folder()
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(
                f"{path} holds no config.json, so it is not a model folder; give the folder that "
                "save_pretrained wrote, a hub id such as 'mistralai/Mixtral-8x7B-v0.1', or 'demo'."
            )
        return str(path)
    looks_local = isinstance(name, Path) or str(name).startswith((".", "/", "~")) or path.is_file()
    if looks_local or str(name).count("/") > 1:
        raise FileNotFoundError(
            f"No model folder at {name}; give an existing folder, a hub id, or 'demo'."
        )
    return str(name)


def load_pretrained(name: str | Path, dtype: str = "auto") -> tuple[PreTrainedModel, Any, str]:
    """Load model and tokenizer on the CPU; return them with what was loaded.

    Args:
        name: `"demo"`, a folder or a hub id.
        dtype: `"auto"` for the checkpoint's own, or a name in `DTYPES`.

    Raises:
        ValueError: the dtype name is unknown.
        FileNotFoundError: there is no such folder, or the hub does not have it.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; expected 'auto', {', '.join(DTYPES)}.")
    source = resolve_checkpoint(name)
    bars = nullcontext() if name != "demo" else _no_progress_bars()
    try:
        with bars:
            hf = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES.get(dtype, "auto"))
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise FileNotFoundError(
            f"{name!r} could not be loaded: {error} Give a folder, a hub id that can be reached "
            "or is cached, or 'demo'."
        ) from error
    return hf.eval().requires_grad_(False), tokenizer, source


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars for what takes an instant."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def describe(
    hf: PreTrainedModel, layers: list[MoELayer], model_id: str, routed: torch.Tensor
) -> MoESpec:
    """Return the spec of a loaded model whose experts are still in place.

    `routed` [T, K] is one layer's router weights as the experts receive them: they tell K and
    whether the router normalises, which configs name differently in every family.
    """
    sums = routed.float().sum(dim=-1)
    first = layers[0]
    parameters = [getattr(first.experts, name) for name in first.parameter_names]
    values_per_expert = sum(p.numel() // first.n_experts for p in parameters)
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    return MoESpec(
        model_id=model_id,
        revision=_weights_digest(hf),
        family=hf.config.model_type,
        n_layers=len(layers),
        n_experts=first.n_experts,
        top_k=routed.shape[1],
        hidden_size=hf.config.get_text_config().hidden_size,
        expert_bytes={
            name: values_per_expert * torch_dtype.itemsize for name, torch_dtype in DTYPES.items()
        },
        dtype=dtype,
        layer_paths=tuple(layer.path for layer in layers),
        normalises_router=bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-2)),
    )


def _weights_digest(hf: PreTrainedModel) -> str:
    """Identify weights by all their vectors and router-sized matrices, alike in any precision.

    Norms and routers change with any training and are small, so large checkpoints stay quick to
    identify. Values are rounded to bfloat16, so that the same checkpoint loaded in another
    precision is recognised.
    """
    sha = hashlib.sha256()
    for name, parameter in sorted(hf.named_parameters()):
        if parameter.dim() < 2 or (min(parameter.shape) <= 256 and parameter.dim() == 2):
            values = parameter.detach().to("cpu", torch.bfloat16).contiguous()
            sha.update(name.encode())
            sha.update(values.view(torch.uint8).numpy().tobytes())
    return f"weights:{sha.hexdigest()[:24]}"


def routed_weights(hf: PreTrainedModel, layers: list[MoELayer]) -> torch.Tensor:
    """Return the router weights [1, K] that the first layer's experts receive for one token."""
    received: list[torch.Tensor] = []

    def receive(_: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        received.append(kwargs["top_k_weights"] if "top_k_weights" in kwargs else args[2])

    handle = layers[0].experts.register_forward_pre_hook(receive, with_kwargs=True)
    try:
        with torch.no_grad():
            hf(torch.zeros((1, 1), dtype=torch.long, device=hf.device), use_cache=False)
    finally:
        handle.remove()
    return received[0]
