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
from transformers.cache_utils import StaticCache, StaticLayer

from adapmoe_lab.models.support import UnsupportedModelError

NAMES = ("cache", "past_key_values")
"""What the cache is called, the newer name first."""


def forward_cached(
    hf: nn.Module,
    token_ids: torch.Tensor,
    previous: Any = None,
    *,
    forward: Callable[..., Any] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    """Run tokens after those a cache holds; return the logits and the cache, now with them.

    Args:
        hf: a transformers causal language model.
        token_ids: int64 [B, T], on the model's device.
        previous: what the call before returned; None where a sequence begins.
        forward: what to call in the model's place, its compiled form; None for itself.
        options: what else the model's forward takes, such as `logits_to_keep`.

    Returns:
        Logits [B, T, V], or as many of the last tokens as are kept, and the cache.
    """
    options[_parameter(type(hf).forward)] = previous
    run = hf if forward is None else forward
    output = run(input_ids=token_ids, use_cache=True, **options)
    return output.logits, _named(output)


def static_cache(hf: nn.Module, n_tokens: int) -> StaticCache:
    """Return a cache for a sequence of at most `n_tokens`, whose tensors stay where they are.

    Raises:
        UnsupportedModelError: a layer keeps something else than keys and values of every token.
    """
    cache = StaticCache(config=hf.config, max_cache_len=n_tokens)  # pyright: ignore
    others = sorted({type(layer).__name__ for layer in cache.layers} - {StaticLayer.__name__})
    if others:
        raise UnsupportedModelError(
            "Decoding by a captured graph needs layers that keep keys and values of every token; "
            f"this {hf.config.model_type} model has {', '.join(others)}. Load it with "  # pyright: ignore
            "executor='host'."
        )
    return cache


def rewind(cache: StaticCache, n_tokens: int) -> None:
    """Forget all but the first `n_tokens` of a static cache."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(n_tokens)  # pyright: ignore


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
