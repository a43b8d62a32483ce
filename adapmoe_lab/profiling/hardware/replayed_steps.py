"""Decode steps that are replayed on the device, timed at several numbers of misses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from adapmoe_lab.engine.generation.tokens import generate_tokens
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.resident_layer import PROMPT_TOKENS
from adapmoe_lab.profiling.hardware.solved_costs import TimedStep
from adapmoe_lab.profiling.hardware.timed_steps import with_slots
from adapmoe_lab.records import CachePlan, GatingTable

SHARES = (1.0, 0.5, 0.25)
"""Shares of the experts that slots are given to, as far as there is room: each misses otherwise."""


def is_replayed(model: LabModel) -> bool:
    """Whether a model's decode steps are captured graphs as it was loaded."""
    return model.engine.runs_steps_by == "graph"


def replayed_decodes(model: LabModel, n_steps: int) -> list[list[TimedStep]]:
    """Decode with every share of slots, keeping all experts and one of each token.

    Slots and cuts are no part of what is captured, so that it is captured once.
    """
    spec = model.spec
    n_slots = [max(1, round(share * spec.n_experts)) for share in SHARES]
    keeps_one = GatingTable.per_layer(np.zeros(spec.n_layers), spec.top_k)
    return [
        _steps(model, n_steps, with_slots(model, most), gating)
        for gating in ((None, keeps_one) if spec.top_k > 1 else (None,))
        for most in n_slots
    ]


def _steps(
    model: LabModel, n_steps: int, plan: CachePlan, gating: GatingTable | None
) -> list[TimedStep]:
    """Decode in a cache that is empty at first; return the steps after the one that captures."""
    engine, steps = model.engine, []
    engine.configure(gating, plan)
    before, start = engine.traffic, 0.0
    tokens = generate_tokens(model.decoder(), torch.arange(PROMPT_TOKENS), n_steps + 2)
    for step, _ in enumerate(tokens):
        seconds, passed = engine.clock.now() - start, engine.traffic - before
        if step > 1:
            is_gated = gating is not None
            steps.append(
                TimedStep(seconds, passed.kept, is_gated, 0, 0, 0, passed.hits, passed.misses)
            )
        before, start = engine.traffic, engine.clock.now()
    return steps


def with_misses(decodes: Sequence[Sequence[TimedStep]]) -> list[TimedStep]:
    """Return the ungated steps that missed something."""
    return [s for decode in decodes for s in decode if not s.is_gated and s.misses.any()]
