"""Synthetic routing traces for tests that need no model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from adapmoe_lab.records import (
    MoESpec,
    PrecisionPlan,
    Prediction,
    RoutingTrace,
    SensitivityProfile,
)


def make_spec(n_layers: int = 3, n_experts: int = 8, top_k: int = 2) -> MoESpec:
    """Return a spec of a model that does not exist."""
    return MoESpec(
        model_id="synthetic",
        revision="weights:none",
        family="mixtral",
        n_layers=n_layers,
        n_experts=n_experts,
        top_k=top_k,
        hidden_size=16,
        expert_bytes={"bfloat16": 1000, "float32": 2000},
        precision=PrecisionPlan.uniform("bfloat16", (n_layers, n_experts), 1000),
        layer_paths=tuple(f"model.layers.{i}.mlp.experts" for i in range(n_layers)),
    )


def make_trace(
    spec: MoESpec | None = None, n_tokens: int = 200, seed: int = 0, tokens_per_step: int = 1
) -> RoutingTrace:
    """Return a trace with random routing that favours some experts and repeats itself."""
    spec = spec if spec is not None else make_spec()
    rng = np.random.default_rng(seed)
    shape = (n_tokens, spec.n_layers, spec.n_experts)
    logits = rng.normal(size=shape)
    for token in range(1, n_tokens):
        logits[token] = 0.7 * logits[token - 1] + 0.7 * logits[token]
    probs = np.exp(logits - logits.max(axis=2, keepdims=True))
    probs /= probs.sum(axis=2, keepdims=True)
    chosen = np.argsort(-probs, axis=2)[:, :, : spec.top_k]
    weights = np.take_along_axis(probs, chosen, axis=2).astype(np.float32)
    step_ids = np.arange(n_tokens) // tokens_per_step
    return RoutingTrace(
        spec=spec,
        token_ids=rng.integers(0, 100, n_tokens),
        expert_indices=chosen,
        weights=weights / weights.sum(axis=2, keepdims=True),
        router_probs=probs,
        predictions={
            "next_router": {
                1: Prediction(chosen, np.sort(probs, axis=2)[:, :, : -spec.top_k - 1 : -1])
            }
        },
        sequence_starts=[0, n_tokens // 2],
        step_ids=step_ids,
        is_decode=np.full(n_tokens, tokens_per_step == 1),
        labels=("first", "second"),
    )


def predicting(trace: RoutingTrace, share_right: float, seed: int = 0) -> RoutingTrace:
    """Return the trace with next-router candidates of which a share is right."""
    rng = np.random.default_rng(seed)
    spec = trace.spec
    wrong = rng.integers(0, spec.n_experts, trace.expert_indices.shape)
    is_right = rng.random((trace.n_tokens, spec.n_layers, 1)) < share_right
    predicted = np.where(is_right, trace.expert_indices, wrong)
    predicted[:, 0] = -1
    scores = np.where(predicted >= 0, trace.weights, 0)
    return replace(trace, predictions={"next_router": {1: Prediction(predicted, scores)}})


def make_sensitivity(
    spec: MoESpec | None = None, fisher=(9.0, 3.0, 1.0), increase_scale: float = 0.01
) -> SensitivityProfile:
    """Return a profile with curves in proportion to `fisher` and the squared share dropped."""
    spec = spec if spec is not None else make_spec()
    fisher = np.asarray(fisher, dtype=float)
    cuts = np.linspace(1 / max(2, spec.top_k), 1.0, 33)
    increase = np.outer(fisher, (1 - cuts) ** 2) * increase_scale
    return SensitivityProfile(
        model_fingerprint=spec.fingerprint(),
        estimator="fisher",
        stand_in="nothing",
        n_tokens=100,
        n_sequences=2,
        cost=fisher,
        standard_error=fisher / 10,
        fisher=fisher,
        fisher_se=fisher / 10,
        cuts=cuts,
        increase_nats=increase,
        increase_se=increase / 10,
        first_order=np.zeros(increase.shape),
        first_order_se=np.zeros(increase.shape),
        skipped=np.tile(np.linspace(1 - 1 / spec.top_k, 0, 33), (len(fisher), 1)),
    )
