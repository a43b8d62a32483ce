"""The losses of the demo model: next-token, per domain, and the balance of its routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from adapmoe_lab.models.demo_architecture import DemoModel

EVALUATION_BATCH_TOKENS = {"cuda": 32_768, "cpu": 4_096}


def compute_weights(model: DemoModel) -> dict[str, Tensor]:
    """Return the weights to compute with: bfloat16 copies on CUDA, elsewhere the model's own.

    Gradients flow through the copies to the float32 master weights. The experts' grouped matrix
    product is not covered by autocast, hence the explicit copies.
    """
    weights = dict(model.named_parameters())
    if model.device.type != "cuda":
        return weights
    return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}


def next_token_loss(model: DemoModel, weights: Mapping[str, Tensor], windows: Tensor) -> Tensor:
    """Return float32[B, S], nats per token, for windows int64[B, S + 1] under the given weights."""
    arguments = {"input_ids": windows[:, :-1], "use_cache": False}
    logits = functional_call(model, dict(weights), kwargs=arguments).logits  # [B, S, V]
    targets = windows[:, 1:]
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none"
    )
    return losses.view(targets.shape)


def balance_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Return the load-balancing loss, averaged over layers; 1 is perfect balance.

    Switch Transformer (arXiv 2101.03961), equations 4 to 6, for top-k routing, over one [T, E]
    tensor per layer. transformers pools all layers before it balances, so that two layers may
    each starve half of their experts; here every layer is held to it.
    """
    return torch.stack([_layer_balance(logits, top_k) for logits in router_logits]).mean()


def _layer_balance(logits: Tensor, top_k: int) -> Tensor:
    probabilities = logits.float().softmax(-1)  # [T, E]
    chosen = torch.zeros_like(probabilities).scatter_(
        1, probabilities.topk(top_k).indices, 1 / top_k
    )
    n_experts = logits.shape[-1]
    return n_experts * (chosen.mean(0) * probabilities.mean(0)).sum()


@torch.no_grad()
def losses_by_domain(model: DemoModel, windows: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return each domain's mean loss in nats per token; domains without windows are left out."""
    weights = compute_weights(model)
    means = {}
    for name, rows in windows.items():
        if not rows.size:
            continue
        n_rows = max(1, EVALUATION_BATCH_TOKENS.get(model.device.type, 4_096) // rows.shape[1])
        batches = torch.from_numpy(rows).split(n_rows)
        losses = [next_token_loss(model, weights, batch.to(model.device)) for batch in batches]
        means[name] = torch.cat(losses).mean().item()
    return means
