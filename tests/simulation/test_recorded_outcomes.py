"""What becomes of every expert under every eviction policy is as version 0.1 had it.

The hashes were written down before the policies moved into files of their own. Everything drawn
is a whole number, so that no machine rounds it otherwise.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from traces import make_spec

from adapmoe_lab.policies.allocation.slots import shared, slots_plan, with_pins
from adapmoe_lab.policies.eviction.registry import POLICIES
from adapmoe_lab.records import CachePlan, RoutingTrace
from adapmoe_lab.simulation.replay.replay import replay

RECORDED = Path(__file__).parents[1] / "fixtures" / "replay_outcomes_0_1.json"
SHAPES = {"decode": (3, 8, 2, 1), "prefill": (4, 16, 3, 5), "wide": (2, 64, 8, 1)}
N_TOKENS = 600


def whole_number_trace(name: str) -> RoutingTrace:
    """Return routing by scores that are multiples of 1/1024, and drift from token to token."""
    n_layers, n_experts, top_k, tokens_per_step = SHAPES[name]
    spec = make_spec(n_layers, n_experts, top_k)
    rng = np.random.default_rng(11)
    drawn = rng.integers(0, 512, (N_TOKENS, n_layers, n_experts))
    drift = rng.integers(0, 512, (N_TOKENS // 50, n_layers, n_experts)).repeat(50, axis=0)
    scores = (drawn + drift) / 1024
    chosen = np.argsort(-scores, axis=2, kind="stable")[:, :, :top_k]
    return RoutingTrace(
        spec=spec,
        token_ids=rng.integers(0, 100, N_TOKENS),
        expert_indices=chosen,
        weights=np.take_along_axis(scores, chosen, axis=2) + 1 / 1024,
        router_probs=scores,
        predictions={},
        sequence_starts=[0],
        step_ids=np.arange(N_TOKENS) // tokens_per_step,
        is_decode=np.full(N_TOKENS, tokens_per_step == 1),
        labels=("drawn",),
    )


def plans(trace: RoutingTrace, eviction: str) -> dict[str, CachePlan]:
    n_experts = trace.spec.n_experts
    made = {
        f"{number} slots": slots_plan(trace.spec, number)
        for number in (0, 1, n_experts // 4, n_experts // 2)
    }
    made["shared"] = shared(made[f"{n_experts // 2} slots"])
    if not POLICIES[eviction].pins:
        return made
    uses = np.arange(trace.spec.n_layers * n_experts).reshape(-1, n_experts)
    return {name: with_pins(plan, uses) for name, plan in made.items()}


def outcome_hashes(eviction: str) -> dict[str, str]:
    """Return a hash of what became of each member of each set, by trace and plan."""
    found = {}
    for name in SHAPES:
        trace = whole_number_trace(name)
        keep = np.ones(trace.weights.shape, dtype=np.bool_)
        keep[::3, :, -1] = False
        for title, plan in plans(trace, eviction).items():
            replayed = replay(trace, keep, plan, eviction)
            kept = hashlib.sha256(replayed.hits.tobytes() + replayed.loads.tobytes())
            for layer, starts in enumerate(replayed.starts):
                kept.update(replayed.members[layer, : starts[-1]].tobytes())
                kept.update(replayed.outcomes[layer, : starts[-1]].tobytes())
            found[f"{name}, {title}"] = kept.hexdigest()[:16]
    return found


@pytest.mark.parametrize("eviction", POLICIES)
def test_outcomes_are_those_of_version_0_1(eviction):
    assert outcome_hashes(eviction) == json.loads(RECORDED.read_text())[eviction]
