"""Constants that a forward copies from the host, kept on the device for a step that is captured."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MOST_NUMBERS = 2**16
"""Numbers of the largest tensor that is taken for a constant."""

COPYING = (torch.Tensor.to, torch.tensor, torch.as_tensor)
"""Functions of torch by which a forward copies to its device."""


class DeviceConstants(TorchFunctionMode):
    """Within it, what a forward copies to a device is copied once, and then repeated there.

    A captured step cannot copy from the memory that a forward computes in. What it copies is told
    apart by its values, so that a rehearsal copies all that a capture repeats, and what differs
    from token to token is never mistaken for a constant of another value. A graph reads what is
    kept here: it must live as long.
    """

    def __init__(self, device: torch.device) -> None:
        """Keep nothing yet; `device` is where a forward computes."""
        super().__init__()
        self._device = device
        self._kept: dict[Hashable, torch.Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch, or repeat what it copied before."""
        kwargs = kwargs or {}
        copied = self._copied(func, args, kwargs)
        if copied is None or (copied not in self._kept and _is_capturing(self._device)):
            return func(*args, **kwargs)
        if copied not in self._kept:
            self._kept[copied] = func(*args, **kwargs)
        return self._kept[copied].clone()  # whoever writes to it has a copy

    def _copied(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Hashable | None:
        """Return what identifies a copy to the device by its values; None of anything else."""
        if not args or func not in COPYING:
            return None
        source, options = args[0], (*args[1:], *kwargs.values())
        if _target(options) != self._device.type:
            return None
        if func is torch.Tensor.to:
            values = repr((source.dtype, source.tolist())) if self._is_constant(source) else None
        else:
            values = repr(source) if _are_numbers(source) else None
        if values is None:
            return None
        return func, values, tuple(map(_described, options)), tuple(kwargs)

    def _is_constant(self, source: torch.Tensor) -> bool:
        """Whether a tensor lies on the host, and can be a constant by its size."""
        is_elsewhere = source.device.type == "cpu" and self._device.type != "cpu"
        return is_elsewhere and source.numel() <= MOST_NUMBERS and not source.requires_grad


def _target(options: Sequence[Any]) -> str | None:
    """Return the kind of device that arguments name; None where they name none."""
    for option in options:
        if isinstance(option, torch.Tensor):
            return option.device.type
        if isinstance(option, (str, torch.device)):
            return torch.device(option).type
    return None


def _described(option: Any) -> str:
    """Return what an argument asks for; of a tensor, nobody reads the values."""
    if isinstance(option, torch.Tensor):
        return repr((option.dtype, option.device))
    return repr(option)


def _are_numbers(values: Any) -> bool:
    if isinstance(values, (list, tuple)):
        return all(isinstance(value, (bool, int, float)) for value in values)
    return isinstance(values, (bool, int, float))


def _is_capturing(device: torch.device) -> bool:
    """Whether what runs now is recorded and not run, so that nothing of it can be kept."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
