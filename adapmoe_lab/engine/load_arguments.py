"""The arguments of `load` in the forms people pass them, before anything is looked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from adapmoe_lab.records import TunedConfig
from adapmoe_lab.records.arguments import described

ExpertDtype = str | Sequence[Sequence[str]]
"""A precision for all experts, or one for each, [L][E]."""

EXECUTORS = ("host", "graph")
"""What may run the experts: the host layer by layer, or a captured CUDA graph per token."""


def model_name(name: Any) -> str | Path:
    """Return what names a model: a hub id or `"demo"` as it is, a folder as a path.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(name, str):
        return name
    return _path("name", name, "'demo', a folder or a hub id")


def tuned_config(config: Any) -> TunedConfig | None:
    """Return a config, read from its file if that is given.

    Raises:
        ValueError: it is neither a config nor a path.
    """
    if config is None or isinstance(config, TunedConfig):
        return config
    path = _path("config", config, "a TunedConfig or the path of one")
    return TunedConfig.load(path.expanduser())


def store_folder(store: Any) -> Path | None:
    """Return the folder of a prepared store, if one is given.

    Raises:
        ValueError: it is not a path.
    """
    return None if store is None else _path("store", store, "the path of a folder").expanduser()


def dtype_name(argument: str, dtype: Any) -> str:
    """Return the name of a precision, whether given by name or as torch's dtype.

    Raises:
        ValueError: it is neither; whether there is such a precision is not looked at.
    """
    if isinstance(dtype, str | torch.dtype):
        return str(dtype).removeprefix("torch.")
    raise ValueError(
        f"{argument} must be the name of a precision, such as 'bfloat16', or a torch dtype, got "
        f"{described(dtype)}."
    )


def expert_dtypes(dtypes: Any) -> ExpertDtype:
    """Return the precision of all experts, or of each.

    Raises:
        ValueError: it is neither a precision nor a list per layer with one for every expert.
    """
    if isinstance(dtypes, str | torch.dtype) or not isinstance(dtypes, Iterable):
        return dtype_name("expert_dtype", dtypes)
    layers = list(dtypes)
    for layer in layers:
        if isinstance(layer, str) or not isinstance(layer, Iterable):
            raise ValueError(
                "expert_dtype must be one precision for all experts, or a list per layer with one "
                f"for every expert; in place of a layer's list it has {described(layer)}."
            )
    return [
        [dtype_name(f"expert_dtype[{number}]", dtype) for dtype in layer]
        for number, layer in enumerate(layers)
    ]


def optional_text(argument: str, value: Any) -> str | None:
    """Return a text that may be left out.

    Raises:
        ValueError: it is something else.
    """
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"{argument} must be text or None, got {described(value)}.")


def executor_name(name: Any) -> str:
    """Return the name of an executor.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in EXECUTORS:
        known = ", ".join(map(repr, EXECUTORS))
        raise ValueError(f"executor={described(name)} is unknown; expected one of {known}.")
    return name


def check_function(argument: str, value: Any) -> None:
    """Refuse what is to be told texts and cannot be called.

    Raises:
        ValueError: it is no function.
    """
    if not callable(value):
        raise ValueError(
            f"{argument} must be a function of a text, such as print, or lambda text: None to "
            f"hear nothing, got {described(value)}."
        )


def _path(argument: str, value: Any, expected: str) -> Path:
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str):
            return Path(text)
    raise ValueError(f"{argument} must be {expected}, got {described(value)}.")
