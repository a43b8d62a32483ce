"""The arithmetic of one expert, whatever the family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional


class PackedWeight(Protocol):
    """A matrix [output, input] stored in fewer bits than it is computed in."""

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product [n, output] with activations [n, input], in their precision."""
        ...

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix [output, input] in floating point."""
        ...


Weights = Mapping[str, torch.Tensor | PackedWeight]


def run_expert(experts: nn.Module, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
    """Return one expert's output [n, D] for hidden states [n, D].

    Args:
        experts: the transformers experts module, for its layout flags and activation.
        weights: the expert's own tensors under the module's parameter names.
        hidden: the tokens routed to this expert.
    """
    inner = _project(experts, weights, "gate_up_proj" if experts.has_gate else "up_proj", hidden)
    inner = activate(experts, inner)
    output = _project(experts, weights, "down_proj", inner)
    if getattr(experts, "has_post_expert_norm", False):
        output = experts.post_expert_norm(output)
    return output


def activate(experts: nn.Module, inner: torch.Tensor) -> torch.Tensor:
    """Return what an expert's last matrix is given [n, width], from its first product, row by row.

    Args:
        experts: the transformers experts module.
        inner: the first product [n, 2 width]; [n, width] of experts without a gate.
    """
    return experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)


def _project(experts: nn.Module, weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    weight, bias = weights[name], weights.get(f"{name}_bias")
    plain_bias = bias.to(x.dtype) if isinstance(bias, torch.Tensor) else None
    if not isinstance(weight, torch.Tensor):
        product = weight.matmul(x)
    elif experts.is_transposed:
        product = x @ weight.to(x.dtype)
    else:
        return functional.linear(x, weight.to(x.dtype), plain_bias)
    return product if plain_bias is None else product + plain_bias
