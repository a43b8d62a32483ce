"""The devices that computing can be asked to run on."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray


def choose_device(name: str | None) -> torch.device:
    """Return the device that a name asks for: CUDA where there is one, if None.

    Raises:
        ValueError: the name is of no supported device, or torch sees no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(name, str) or name == "auto" or "," in name:
        raise ValueError(
            f"device={name!r} asks for several devices; one model runs on one, so name it: "
            "'cpu', 'cuda' or 'cuda:1'."
        )
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ValueError(f"device={name!r} is not supported; expected 'cpu', 'cuda' or 'cuda:N'.")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={name!r} was asked for, but torch {torch.__version__} sees no CUDA device; "
            "use device='cpu', or install a CUDA build of torch."
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


def device_name(device: torch.device) -> str:
    """Return the compute device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
