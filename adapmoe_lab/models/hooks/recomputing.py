"""A backward pass that keeps no activations of a layer but its input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")


@contextmanager
def recomputing_layers(hf: PreTrainedModel) -> Iterator[None]:
    """Let the backward pass of forwards made meanwhile run every layer once more.

    transformers recomputes a layer that is in training mode. The mode of its parts is left alone,
    so that nothing is dropped out and no noise is added.
    """
    layers = [module for module in hf.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [
        {name: vars(layer)[name] for name in FLAGS if name in vars(layer)} for layer in layers
    ]
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    try:
        for layer in layers:
            vars(layer).update(zip(FLAGS, (True, recompute, True), strict=True))
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name in FLAGS:
                vars(layer).pop(name, None)
            vars(layer).update(values)
