"""The devices that computing can be asked to run on."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from numpy.typing import NDArray

SEVERAL = ("auto", "balanced", "balanced_low_0", "sequential")
"""What transformers calls ways to spread a model over devices."""


def choose_device(name: str | torch.device | None) -> torch.device:
    """Return the device that a name asks for: CUDA where there is one, if None.

    Raises:
        ValueError: the name is of no supported device, or torch sees no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asks_for_several = isinstance(name, Sequence | Mapping) and not isinstance(name, str)
    if asks_for_several or name in SEVERAL or (isinstance(name, str) and "," in name):
        raise ValueError(
            f"device={name!r} asks for several devices; one model runs on one, so name it: "
            "'cpu', 'cuda' or 'cuda:1'."
        )
    text = str(name) if isinstance(name, str | torch.device) else ""
    if re.fullmatch(r"cpu|cuda(:\d+)?", text) is None:
        raise ValueError(f"device={name!r} is not supported; expected 'cpu', 'cuda' or 'cuda:N'.")
    device = torch.device(text)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={text!r} was asked for, but torch {torch.__version__} sees no CUDA device; "
            "use device='cpu', or install a CUDA build of torch."
        )
    if device.type == "cuda" and (device.index or 0) >= (n_devices := torch.cuda.device_count()):
        raise ValueError(
            f"device={text!r} was asked for, but torch sees {n_devices} CUDA devices, "
            f"'cuda:0' to 'cuda:{n_devices - 1}'."
        )
    return device


def on_host(tensors: Sequence[torch.Tensor]) -> list[NDArray[Any]]:
    """Return tensors of one device as arrays; from a GPU they come in one copy, as float64.

    Whole numbers beyond 2^53 would not survive that.
    """
    if not tensors[0].is_cuda:
        return [tensor.detach().numpy() for tensor in tensors]
    together = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).cpu()
    parts = zip(together.split([tensor.numel() for tensor in tensors]), tensors, strict=True)
    return [part.view(tensor.shape).to(tensor.dtype).numpy() for part, tensor in parts]


@cache
def runs_kernels(device: torch.device) -> bool:
    """Whether a device runs Triton's kernels; NVIDIA's tensor cores take bfloat16 from Ampere."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    has_triton = is_nvidia and find_spec("triton") is not None
    return has_triton and torch.cuda.get_device_capability(device) >= (8, 0)


def device_name(device: torch.device) -> str:
    """Return the compute device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
