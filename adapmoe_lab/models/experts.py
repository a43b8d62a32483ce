"""The arithmetic of one expert, whatever the family."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

Weights = Mapping[str, torch.Tensor]


def run_expert(experts: nn.Module, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
    """Return one expert's output [n, D] for hidden states [n, D].

    Args:
        experts: the transformers experts module, for its layout flags and activation.
        weights: the expert's own tensors under the module's parameter names.
        hidden: the tokens routed to this expert.
    """
    inner = _project(experts, weights, "gate_up_proj" if experts.has_gate else "up_proj", hidden)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    output = _project(experts, weights, "down_proj", inner)
    if getattr(experts, "has_post_expert_norm", False):
        output = experts.post_expert_norm(output)
    return output


def _project(experts: nn.Module, weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    bias = weights.get(f"{name}_bias")
    if experts.is_transposed:
        product = x @ weights[name]
        return product if bias is None else product + bias
    return functional.linear(x, weights[name], bias)
