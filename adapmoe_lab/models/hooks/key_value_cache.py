"""Forward passes with a key-value cache, in every supported transformers.

The one place that knows what transformers calls the cache: until 5.23 forwards take it as
`past_key_values` and return it under that name, since 5.24 both call it `cache`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

NAMES = ("cache", "past_key_values")
"""What the cache is called, the newer name first."""


def forward_cached(
    hf: nn.Module, token_ids: torch.Tensor, previous: Any = None, **options: Any
) -> tuple[torch.Tensor, Any]:
    """Run tokens after those a cache holds; return the logits and the cache, now with them.

    Args:
        hf: a transformers causal language model.
        token_ids: int64 [B, T], on the model's device.
        previous: what the call before returned; None where a sequence begins.
        options: what else the model's forward takes, such as `logits_to_keep`.

    Returns:
        Logits [B, T, V], or as many of the last tokens as are kept, and the cache.
    """
    options[_parameter(type(hf).forward)] = previous
    output = hf(input_ids=token_ids, use_cache=True, **options)
    return output.logits, _named(output)


def cache_given(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among a forward's keyword arguments, None if there is none."""
    return _named(arguments)


def _named(values: Mapping[str, Any]) -> Any:
    """Return what is kept under the newest name; outputs of 5.24 warn when asked for the other."""
    return next((values[name] for name in NAMES if name in values), None)


@cache
def _parameter(forward: Callable[..., Any]) -> str:
    """Return the name by which a model class's forward takes the cache."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in NAMES if name in parameters), NAMES[0])
