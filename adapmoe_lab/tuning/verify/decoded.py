"""Decoding as a measurement does, with the routing recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapmoe_lab.engine.generation.tokens import generate_tokens
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.profiling.routing.recorder import RoutingRecorder
from adapmoe_lab.records import RoutingTrace, Traffic, TunedConfig
from adapmoe_lab.records.progress import Progress


@dataclass(frozen=True, eq=False)
class Decoded:
    """What was routed while prompts were continued, and what the executor counted of it.

    Attributes:
        trace: the routing, a step for each forward pass.
        traffic: the executor's counters.
        config: what it ran under, with its slots.
        runs_steps_by: what runs steps under it that are not observed, `"host"` or `"graph"`.
    """

    trace: RoutingTrace
    traffic: Traffic
    config: TunedConfig
    runs_steps_by: str


def record_decode(
    model: LabModel,
    config: TunedConfig,
    prompts: Sequence[torch.Tensor],
    new_tokens: int,
    progress: Progress | None = None,
) -> Decoded:
    """Continue prompts, token ids int64 [T] each, greedily under a config, from an empty cache.

    Predictions are recorded as far as the config prefetches by them. An emulated link holds nothing
    up, which changes no count but of what is prefetched.

    Raises:
        UnsupportedModelError: the model's routing cannot be recorded.
    """
    table = config.prefetch
    predictors = () if table is None else model.predictors(table.fitted)
    with model.running(config), model.link.without_link_delay():
        recorder = RoutingRecorder(model, predictors)
        with recorder.recording():
            for done, prompt in enumerate(prompts):
                if progress is not None:
                    progress(done, len(prompts), "recording routing")
                for _ in generate_tokens(model.decoder(), prompt, new_tokens):
                    pass
        if progress is not None:
            progress(len(prompts), len(prompts), "recording routing")
        engine = model.engine
        return Decoded(
            recorder.trace(), engine.traffic, model.effective_config, engine.runs_steps_by
        )
