"""The arguments of `load` in the forms people pass them, before anything is looked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from adapmoe_lab.engine.device import choose_device
from adapmoe_lab.models.checkpoint.meta_model import DTYPES
from adapmoe_lab.policies.allocation.slots import check_size
from adapmoe_lab.records import TunedConfig
from adapmoe_lab.records.arguments import described, whole_number

ExpertDtype = str | Sequence[Sequence[str]]
"""A precision for all experts, or one for each, [L][E]."""

EXECUTORS = ("host", "graph", "auto")
"""What may run the experts: the host layer by layer, a captured CUDA graph per token, or that where
it can."""


@dataclass(frozen=True, eq=False)
class LoadRequest:
    """What `load` is asked for, every argument in one form; see there.

    Precisions that `"auto"` leaves open are those of the config, where it names them.
    """

    name: str | Path
    config: TunedConfig | None
    device: torch.device
    dtype: str
    expert_dtype: ExpertDtype
    expert_memory: str | float | None
    host_memory: str | float | None
    store: Path | None
    revision: str | None
    max_context_tokens: int | None
    batch_size: int
    executor: str
    compile_steps: bool

    @classmethod
    def of(
        cls,
        *,
        name: Any,
        config: Any,
        device: Any,
        dtype: Any,
        expert_dtype: Any,
        expert_memory: Any,
        host_memory: Any,
        store: Any,
        revision: Any,
        max_context_tokens: Any,
        batch_size: Any,
        executor: Any,
        compile_steps: Any,
    ) -> Self:
        """Take the arguments of `load` as people pass them.

        Raises:
            ValueError: one is out of range; the text says what was expected.
        """
        for argument, size in (("expert_memory", expert_memory), ("host_memory", host_memory)):
            if size is not None:
                check_size(argument, size)
        if max_context_tokens is not None:
            max_context_tokens = whole_number("max_context_tokens", max_context_tokens, at_least=1)
        config = tuned_config(config)
        precisions = dtype_name("dtype", dtype), expert_dtypes(expert_dtype)
        dtype, expert_dtype = _planned_precisions(config, *precisions)
        return cls(
            name=model_name(name),
            config=config,
            device=choose_device(device),
            dtype=dtype,
            expert_dtype=expert_dtype,
            expert_memory=expert_memory,
            host_memory=host_memory,
            store=store_folder(store),
            revision=optional_text("revision", revision),
            max_context_tokens=max_context_tokens,
            batch_size=whole_number("batch_size", batch_size, at_least=1),
            executor=executor_name(executor),
            compile_steps=compiling_steps(compile_steps, executor),
        )


def _planned_precisions(
    config: TunedConfig | None, dtype: str, expert_dtype: ExpertDtype
) -> tuple[str, ExpertDtype]:
    """Return the precisions to compute and to store in, those of a config where they are open."""
    planned = config.precision if config is not None else None
    if planned is None or planned.names is None or expert_dtype != "auto":
        return dtype, expert_dtype
    if dtype == "auto" and planned.name in DTYPES:
        dtype = planned.name
    return dtype, planned.name or planned.names


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


def compiling_steps(compile_steps: Any, executor: str) -> bool:
    """Return whether captured steps are compiled.

    Raises:
        ValueError: no truth value was given, or none is captured.
    """
    if not isinstance(compile_steps, bool | np.bool_):
        raise ValueError(f"compile_steps must be True or False, got {described(compile_steps)}.")
    if compile_steps and executor == "host":
        raise ValueError(
            "compile_steps=True compiles what a captured graph replays, and executor='host' "
            "replays none; give executor='graph' or executor='auto'."
        )
    return bool(compile_steps)


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
