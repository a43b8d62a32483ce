"""Where the experts and routers of a transformers model are, found by the experts interface."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

INTERFACE_ATTRIBUTES = ("is_transposed", "has_bias", "has_gate", "_apply_gate", "num_experts")
NOT_ON_THE_SEAM = ("dbrx", "jetmoe", "llama4", "llama4_text")
LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)(?:\.|$)")


class UnsupportedModelError(ValueError):
    """The model has no experts this project can serve."""


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One layer with routed experts.

    Attributes:
        path: module path of the experts.
        experts: the transformers experts module, weights fused over experts.
        router: the module whose weight [E, D] scores the experts.
    """

    path: str
    experts: nn.Module
    router: nn.Module

    @property
    def n_experts(self) -> int:
        """E, the number of routed experts."""
        return int(self.experts.num_experts)  # pyright: ignore[reportArgumentType]

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters that hold one entry per expert."""
        return tuple(name for name, _ in self.experts.named_parameters(recurse=False))


def find_moe_layers(hf: PreTrainedModel) -> list[MoELayer]:
    """Return the layers of a model that dispatch through transformers' experts interface.

    Raises:
        UnsupportedModelError: there is none, with the reason where it is known.
    """
    layers = []
    for path, module in hf.named_modules():
        if all(hasattr(module, name) for name in INTERFACE_ATTRIBUTES):
            block = hf.get_submodule(path.rpartition(".")[0])
            layers.append(MoELayer(path, module, _router_of(block, module)))
    if layers:
        return sorted(layers, key=lambda layer: _layer_number(layer.path))
    family = hf.config.model_type
    if family in NOT_ON_THE_SEAM:
        raise UnsupportedModelError(
            f"{family} does not use transformers' experts interface, so its experts cannot be "
            "served from outside. Supported: mixtral, olmoe, qwen2_moe, qwen3_moe, deepseek_v2, "
            "deepseek_v3 and every other family that uses the interface."
        )
    raise UnsupportedModelError(
        f"This {family} model has no Mixture-of-Experts layer; give a model with routed experts."
    )


def router_scores(router: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Return a router's probabilities [T, E] for hidden states [T, D], without calling it.

    Calling the router would fire whatever records it.
    """
    bias = getattr(router, "bias", None)
    logits = nn.functional.linear(hidden, router.weight, bias)  # pyright: ignore
    return logits.float().softmax(dim=-1)


def _router_of(block: nn.Module, experts: nn.Module) -> nn.Module:
    """Return the sibling of the experts whose weight scores each expert."""
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        scores_experts = (
            isinstance(weight, torch.Tensor) and weight.dim() == 2 and module is not experts
        )
        if scores_experts and weight.shape[0] == experts.num_experts and "expert" not in name:
            return module
    raise UnsupportedModelError(
        f"No router was found beside the {type(experts).__name__} of {type(block).__name__}."
    )


def _layer_number(path: str) -> int:
    match = LAYER_NUMBER.search(path)
    return int(match[1]) if match else -1
