"""Logits and greedy tokens of a served model against those of the plain transformers model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.executor import Decoder, TokenSampler
from adapmoe_lab.engine.generation.tokens import generate_tokens
from adapmoe_lab.engine.host_driven.decoder import TransformersDecoder
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.memory_plan import HEADROOM, free_memory, in_words
from adapmoe_lab.engine.rounding import rounding_bound
from adapmoe_lab.engine.sampling import Sampling
from adapmoe_lab.models.checkpoint.checkpoint import HFModel, open_checkpoint
from adapmoe_lab.models.checkpoint.plain_model import is_quantised, load_unmodified
from adapmoe_lab.models.families import find_moe_layers
from adapmoe_lab.models.hooks.experts_hook import ExpertsHook
from adapmoe_lab.records import TunedConfig
from adapmoe_lab.records.progress import Progress

UNMODIFIED = "the unmodified model"
OF_STORED = "transformers on the stored experts, dequantised"

CPU_ERROR, GPU_ERROR = 1e-5, 1e-4
"""Largest error of float32; kernels of a GPU add in other orders than one another."""
REROUTED_SHARE = 0.1
"""On a GPU, positions that may be routed otherwise by what was rounded before, and differ more."""


@dataclass(frozen=True, eq=False)
class Exactness:
    """How far a served model is from the plain one, nothing skipped in either.

    Attributes:
        errors: float64 [N], norm of the difference of a position's logits over that of the plain
            model's; positions of texts, then of the steps of a decode. NaN where one is not finite.
        gaps: float64 [M], how far below its best logit the plain model has each token that was
            decoded, over its largest logit; 0 where it chooses the same.
        bound: the most that either may be.
        alike_share: the share of either that must keep to it.
        reference: what the plain model is.
    """

    errors: NDArray[np.float64]
    gaps: NDArray[np.float64]
    bound: float
    alike_share: float
    reference: str

    @property
    def is_exact(self) -> bool:
        """Whether logits and tokens keep to the bound."""
        shares = [np.mean(values <= self.bound) for values in (self.errors, self.gaps)]
        return bool(min(shares) >= self.alike_share)


@torch.no_grad()
def compare_with_plain(
    model: LabModel,
    config: TunedConfig,
    sequences: Sequence[torch.Tensor],
    prompt: torch.Tensor,
    new_tokens: int,
    progress: Progress | None = None,
) -> Exactness:
    """Compare logits on sequences, and those of a greedy decode, with the plain model's.

    The served model runs under a config's slots, eviction and prefetch, and skips nothing. The
    plain model is what transformers loads from the checkpoint; where experts are stored in other
    numbers than they are computed in, or come quantised, it is transformers' model of what is
    stored. Both compute on one device, in one precision, and decode the same tokens.

    Args:
        model: the model to compare.
        config: what it runs under.
        sequences: token ids int64 [T] each.
        prompt: token ids int64 [T] to decode from.
        new_tokens: tokens to decode.
        progress: called with (done, total, text); what it raises stops the run.

    Raises:
        MemoryError: the plain model does not fit beside the served one.
        UnsupportedModelError: transformers cannot load it.
    """
    n_parts = len(sequences) + 1

    def advance(done: int) -> None:
        if progress is not None:
            progress(done, n_parts, "comparing logits")

    errors, device = [], model.engine.device
    with (
        _loaded_plain(model) as (plain, reference),
        model.running(replace(config, gating=None, compensation=None)),
        model.link.without_link_delay(),
    ):
        for done, ids in enumerate(sequences):
            advance(done)
            batch = ids[None].to(device)
            found, right = (
                hf(input_ids=batch, use_cache=False).logits[0] for hf in (model.hf, plain)
            )
            errors.append(_errors(found, right))
        advance(n_parts - 1)
        decoder = _Keeping(model.decoder())
        tokens = list(generate_tokens(decoder, prompt, new_tokens))
        right = _teacher_forced(TransformersDecoder(plain), prompt, tokens)
        errors.append(_errors(torch.stack(decoder.logits), right))
        gaps = _gaps(right, tokens)
        advance(n_parts)
    bound, share = error_bound(model.hf.dtype, device)
    return Exactness(np.concatenate(errors), gaps, bound, share, reference)


def error_bound(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Return the largest error that is no more than rounding, and the share that keeps to it."""
    is_cpu = device.type == "cpu"
    if dtype == torch.float32:
        bound = CPU_ERROR if is_cpu else GPU_ERROR
    else:
        bound = rounding_bound(dtype)
    return bound, 1.0 if is_cpu else 1 - REROUTED_SHARE


@contextmanager
def _loaded_plain(model: LabModel) -> Iterator[tuple[HFModel, str]]:
    """Load the plain model beside a served one, on the same device; it is freed afterwards.

    Yields it and what it is.

    Raises:
        MemoryError: there is no room for it; the text has the numbers.
        UnsupportedModelError: transformers cannot load it.
    """
    _check_plain_fits(model)
    folder, dtype = Path(model.hf.name_or_path), model.hf.dtype
    name = str(dtype).removeprefix("torch.")
    if model.spec.precision.name == name and not is_quantised(folder):
        hf, reference = load_unmodified(folder, dtype), UNMODIFIED
    else:
        hf, reference = _of_stored(model, folder, name), OF_STORED
    yield hf.to(model.engine.device), reference  # pyright: ignore[reportArgumentType]


def _check_plain_fits(model: LabModel) -> None:
    """Raise MemoryError unless the plain model fits beside the served one."""
    spec, device = model.spec, model.engine.device
    expert_bytes = spec.expert_bytes[str(model.hf.dtype).removeprefix("torch.")]
    needed = model.memory.needs.weights + spec.n_layers * spec.n_experts * expert_bytes
    free = free_memory(device)
    for place, n_bytes in ((str(device), free.device_bytes), ("the host", free.host_bytes)):
        if needed > HEADROOM * n_bytes:
            raise MemoryError(
                f"the plain model takes {in_words(needed)} beside this one, {place} has "
                f"{in_words(n_bytes)} free; give a smaller expert_memory, or compare on a larger "
                "machine"
            )


def _of_stored(model: LabModel, folder: Path, dtype: str) -> HFModel:
    """Return transformers' model with the experts that a store holds, as `detach` gives it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told when the model was loaded
        hf = open_checkpoint(folder, dtype).load_skeleton()
    hook = ExpertsHook(hf, find_moe_layers(hf))
    for number in range(model.spec.n_layers):
        hook.give_weights(number, model.store.fused(number, hf.dtype))
    return hf


class _Keeping:
    """A `Decoder` that keeps the logits of every step."""

    def __init__(self, decoder: Decoder) -> None:
        """Keep those of another decoder."""
        self._decoder = decoder
        self.logits: list[torch.Tensor] = []

    @property
    def has_ended(self) -> bool:
        """Whether the other cannot go on."""
        return self._decoder.has_ended

    def prefill(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Run a prompt."""
        return self._kept(self._decoder.prefill(token_ids))

    def step(self, token: int) -> torch.Tensor:
        """Run one token more."""
        return self._kept(self._decoder.step(token))

    def sampler(self, sampling: Sampling, text: torch.Tensor) -> TokenSampler:
        """Return what chooses the tokens that follow a text."""
        return self._decoder.sampler(sampling, text)

    def _kept(self, logits: torch.Tensor) -> torch.Tensor:
        self.logits.append(logits.clone())
        return logits


def _teacher_forced(decoder: Decoder, prompt: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Return the logits [M, V] of what follows a prompt and all but the last of its tokens."""
    steps = [decoder.prefill(prompt).clone(), *(decoder.step(t).clone() for t in tokens[:-1])]
    return torch.stack(steps)


def _errors(found: torch.Tensor, right: torch.Tensor) -> NDArray[np.float64]:
    """Return the relative error of every row of logits [N, V]."""
    found, right = found.float(), right.float()
    smallest = torch.finfo(torch.float32).tiny
    errors = (found - right).norm(dim=1) / right.norm(dim=1).clamp_min(smallest)
    return errors.double().cpu().numpy()


def _gaps(right: torch.Tensor, tokens: Sequence[int]) -> NDArray[np.float64]:
    """Return how far below the best logit of each row [M, V] that of its token lies, relatively."""
    right = right.float()
    chosen = right.gather(1, torch.tensor(tokens, device=right.device)[:, None])[:, 0]
    gaps = (right.amax(dim=1) - chosen) / right.abs().amax(dim=1)
    return gaps.double().cpu().numpy()
