"""Decoding by transformers' own forward passes, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapmoe_lab.engine.sampling import Sampler, Sampling
from adapmoe_lab.models.hooks.key_value_cache import forward_cached

STEADY_ATTENTION = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Attention kernels that take any length as it comes.

cuDNN's, which torch may choose on an H100, builds a plan for every new length, and every step of
decoding has one (https://github.com/pytorch/pytorch/pull/155958).
"""


class UnbrokenPasses:
    """Remembers whether a pass of a sequence was interrupted.

    Attributes:
        was_interrupted: whether one was.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.was_interrupted = False

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Run a pass.

        Raises:
            RuntimeError: one before was interrupted.
        """
        if self.was_interrupted:
            raise RuntimeError(
                "A pass of this sequence was interrupted: some layers know of its tokens, others "
                "do not. Begin again with model.decoder()."
            )
        self.was_interrupted = True
        yield
        self.was_interrupted = False


class TransformersDecoder:
    """A `Decoder` of any causal language model, whoever runs its experts."""

    def __init__(self, hf: nn.Module) -> None:
        """Begin a sequence."""
        self._hf = hf
        self._cache: Any = None
        self._unbroken = UnbrokenPasses()

    @property
    def has_ended(self) -> bool:
        """Whether a pass was interrupted."""
        return self._unbroken.was_interrupted

    def prefill(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Run a prompt, int64 [T] on any device; return the logits [V] of what follows it."""
        return self._run(token_ids[None].to(self._hf.device))  # pyright: ignore[reportArgumentType]

    def step(self, token: int) -> torch.Tensor:
        """Run one token more; return the logits [V] of what follows it."""
        return self._run(torch.full((1, 1), token, device=self._hf.device))  # pyright: ignore

    def sampler(self, sampling: Sampling, text: torch.Tensor) -> Sampler:
        """Return what chooses the tokens that follow a text, int64 [T]."""
        return Sampler(sampling, text)

    @torch.no_grad()
    def _run(self, token_ids: torch.Tensor) -> torch.Tensor:
        with self._unbroken.passing(), sdpa_kernel(STEADY_ATTENTION):
            logits, self._cache = forward_cached(self._hf, token_ids, self._cache, logits_to_keep=1)
        return logits[0, -1]
