"""Forward passes with a key-value cache, in every supported transformers.

The one place that knows what transformers calls the cache: until 5.23 forwards take it as
`past_key_values` and return it under that name, since 5.24 both call it `cache`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from adapmoe_lab.models.support import UnsupportedModelError

NAMES = ("cache", "past_key_values")
"""What the cache is called, the newer name first."""

LAYERS = frozenset(
    {
        "StaticLayer", "StaticIndexedLayer", "LinearAttentionLayer", "DummyLayer",
        "LinearAttentionAndStaticFullAttentionLayer",
    }
)  # fmt: skip
"""Layers of transformers' caches whose tensors are all there is to them."""

LENGTHS = ("cumulative_length", "indexer_cumulative_length")
"""Where a layer counts the tokens it keeps."""


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


class StepCache(StaticCache):
    """What a model keeps of one sequence, in tensors that stay where they are.

    Layers with a sliding window keep every token, as others do: transformers' own for them keeps a
    Python length, which a captured step would repeat as it was. What is past the window is masked
    either way.
    """

    def __init__(self, hf: nn.Module, n_tokens: int) -> None:
        """Make room for at most `n_tokens`; see `static_cache`."""
        super().__init__(config=hf.config, max_cache_len=n_tokens)  # pyright: ignore
        self.layers = [_of_every_token(layer, n_tokens) for layer in self.layers]
        self._marked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Return how many tokens a layer keeps, and will not be changed when it keeps more.

        transformers' own is the layer's counter, which some forwards use after it went on.
        """
        length = super().get_seq_length(layer_idx)
        return length.clone() if isinstance(length, torch.Tensor) else length

    @property
    def keeps_states(self) -> bool:
        """Whether some layers keep states that each token replaces, instead of every token."""
        return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)

    @contextmanager
    def marked(self) -> Iterator[None]:
        """Let `rewind` restore the states that are kept now, until it ends."""
        self._marked = [(state, state.clone()) for state in self._states()]
        try:
            yield
        finally:
            self._marked = []

    def rewind(self, n_tokens: int) -> None:
        """Forget all but the first `n_tokens`; states are those of when it was marked."""
        for layer in self.layers:
            for name in LENGTHS:
                length = getattr(layer, name, None)
                if length is not None:
                    length.fill_(n_tokens)
        for state, before in self._marked:
            state.copy_(before)

    def _states(self) -> Iterator[torch.Tensor]:
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for states in (layer.conv_states, layer.recurrent_states):
                    yield from (state for state in states.values() if state is not None)


def static_cache(hf: nn.Module, n_tokens: int) -> StepCache:
    """Return a cache for a sequence of at most `n_tokens`, whose tensors stay where they are.

    Raises:
        UnsupportedModelError: the model keeps something else, or nothing is known of what it keeps.
    """
    model_type: str = hf.config.model_type  # pyright: ignore
    try:
        cache = StepCache(hf, n_tokens)
    except (KeyError, TypeError, ValueError) as error:
        raise _not_kept(
            model_type, f"transformers has no static cache for it ({error!r})"
        ) from error
    others = sorted({type(layer).__name__ for layer in cache.layers} - LAYERS)
    if others:
        raise _not_kept(model_type, f"this one has {', '.join(others)}")
    return cache


def _of_every_token(layer: Any, n_tokens: int) -> Any:
    """Return a layer as it is, or one that keeps every token where it would keep a window."""
    if not isinstance(layer, StaticSlidingWindowLayer):
        return layer
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        whole = LinearAttentionAndStaticFullAttentionLayer(n_tokens, layer.number_of_states)
    else:
        whole = StaticLayer(n_tokens)
    whole.is_sliding = True  # masks of sliding layers are made for the first that is
    return whole


def _not_kept(model_type: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "Decoding by a captured graph needs layers that keep what they know of a sequence in "
        f"tensors of fixed size; of {model_type}, {why}. Load it with executor='host'."
    )


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
