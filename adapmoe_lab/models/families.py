"""Where the experts and routers of a transformers model are, found by the experts interface."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from adapmoe_lab.models.support import (
    Family,
    Scoring,
    Trait,
    UnsupportedModelError,
    find_family,
    refusal,
)

INTERFACE_ATTRIBUTES = ("is_transposed", "has_bias", "has_gate", "_apply_gate", "num_experts")
ROUTER_NAMES = ("gate", "router")
LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)(?:\.|$)")

SCORES = {
    Scoring.SOFTMAX: lambda logits: logits.softmax(dim=-1),
    Scoring.SIGMOID: torch.sigmoid,
    Scoring.SQRT_SOFTPLUS: lambda logits: nn.functional.softplus(logits).sqrt(),
}


@dataclass(frozen=True, eq=False)
class Router:
    """What scores the experts of one layer.

    Attributes:
        module: holds the weight [E or more, D]; its first E rows score the routed experts.
        n_experts: E, the number of routed experts.
        scoring: how logits become scores.
        softcap: logits are bent to stay within it; 0 for no bound.
        reads_experts_input: whether it scores what the experts are given.
    """

    module: nn.Module
    n_experts: int
    scoring: Scoring = Scoring.SOFTMAX
    softcap: float = 0.0
    reads_experts_input: bool = True


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One layer with routed experts.

    Attributes:
        path: module path of the experts.
        experts: the transformers experts module, weights fused over experts.
        router: what scores the experts.
        n_runs: how often a forward pass runs the layer.
    """

    path: str
    experts: nn.Module
    router: Router
    n_runs: int = 1

    @property
    def n_experts(self) -> int:
        """E, the number of routed experts."""
        return int(self.experts.num_experts)  # pyright: ignore[reportArgumentType]

    @property
    def input_size(self) -> int:
        """D, the width of what an expert is given: of the hidden states, or narrower.

        Known where the experts hold their parameters.
        """
        return _input_size(self.experts)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters that hold one entry per expert."""
        return tuple(name for name, _ in self.experts.named_parameters(recurse=False))


def find_moe_layers(hf: PreTrainedModel) -> list[MoELayer]:
    """Return the layers of a model that dispatch through transformers' experts interface.

    Raises:
        UnsupportedModelError: there is none, with the reason where it is known, or the layers'
            experts differ in number or shape.
    """
    family = find_family(hf.config.model_type)
    layers = []
    for path, module in hf.named_modules():
        if all(hasattr(module, name) for name in INTERFACE_ATTRIBUTES):
            _check_has_experts(module, path, hf.config.model_type)
            block = hf.get_submodule(path.rpartition(".")[0])
            router = _find_router(block, module, family)
            layers.append(MoELayer(path, module, router, _n_runs(hf.config, path)))
    if not layers:
        raise UnsupportedModelError(refusal(hf.config.model_type))
    _check_alike(layers, hf.config.model_type)
    return sorted(layers, key=lambda layer: _layer_number(layer.path))


def served_layers(hf: PreTrainedModel, known: list[MoELayer]) -> list[MoELayer]:
    """Return the layers of a model loaded without its experts.

    `known` are those of its meta model, whose parameters show what the routers read.
    """
    return [
        replace(
            layer,
            router=replace(layer.router, reads_experts_input=seen.router.reads_experts_input),
        )
        for layer, seen in zip(find_moe_layers(hf), known, strict=True)
    ]


def check_each_runs_once(layers: Sequence[MoELayer]) -> None:
    """Refuse what takes a forward pass to run every layer once, in order.

    Raises:
        UnsupportedModelError: some layers run several times.
    """
    looped = [number for number, layer in enumerate(layers) if layer.n_runs > 1]
    if looped:
        raise UnsupportedModelError(
            f"This model runs {len(looped)} of its {len(layers)} layers with experts (from layer "
            f"{looped[0]} to {looped[-1]}) {layers[looped[0]].n_runs} times for each token, which "
            "recordings, estimates and predictions do not follow. The model can be served, but "
            "not profiled."
        )


def router_scores(router: Router, hidden: torch.Tensor) -> torch.Tensor:
    """Return a router's scores [T, E] of hidden states [T, D], float32, without calling it.

    Softmax scores sum to one; sigmoid scores are one expert's each. Biases that only take part in
    choosing experts are left out.

    Raises:
        UnsupportedModelError: the router reads something else than the experts' input.
    """
    return scores_of_logits(router, _all_logits(router, hidden))[:, : router.n_experts]


def router_logits(router: Router, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits [T, E] behind a router's scores of hidden states [T, D], float32.

    Raises:
        UnsupportedModelError: the router reads something else than the experts' input.
    """
    return _all_logits(router, hidden)[:, : router.n_experts]


def check_scores_known(router: Router) -> None:
    """Raise UnsupportedModelError where a router's scores do not follow from the experts' input."""
    if not router.reads_experts_input:
        raise UnsupportedModelError(
            f"This model's {type(router.module).__name__} does not score what the experts are "
            "given, so its scores cannot be recorded or predicted. The model can be served, but "
            "not profiled."
        )


def scores_of_logits(router: Router, logits: torch.Tensor) -> torch.Tensor:
    """Return the scores [T, n] that a router would make of logits [T, n]."""
    return SCORES[router.scoring](logits)


def _all_logits(router: Router, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits of every row of the router, experts first; calling it fires recorders.

    Raises:
        UnsupportedModelError: the router reads something else than the experts' input.
    """
    check_scores_known(router)
    weight: torch.Tensor = router.module.weight  # pyright: ignore[reportAssignmentType]
    bias = getattr(router.module, "bias", None)
    logits = nn.functional.linear(hidden.to(weight.dtype), weight, bias).float()
    if router.softcap > 0:
        logits = router.softcap * torch.tanh(logits / router.softcap)
    return logits


def _check_has_experts(experts: nn.Module, path: str, model_type: str) -> None:
    n_experts = int(experts.num_experts)  # pyright: ignore[reportArgumentType]
    if n_experts < 1:
        raise UnsupportedModelError(
            f"{path} of this {model_type} model has {n_experts} experts by its config.json; "
            "expected at least one. Correct config.json, or download the model again."
        )


def _find_router(block: nn.Module, experts: nn.Module, family: Family) -> Router:
    """Return the sibling of the experts that scores them.

    It is called gate or router, or else is any sibling with as many rows as there are experts. Its
    weight may lie deeper, and may have rows past the experts': for shared experts, or for none.
    """
    n_experts = int(experts.num_experts)  # pyright: ignore[reportArgumentType]
    siblings = {name: m for name, m in block.named_children() if "expert" not in name}
    named = [part for name in ROUTER_NAMES if name in siblings for part in siblings[name].modules()]
    others = [part for sibling in siblings.values() for part in sibling.modules()]
    candidates = [m for m in named if _n_rows(m) >= n_experts]
    candidates = candidates or [m for m in others if _n_rows(m) == n_experts]
    if not candidates:
        raise UnsupportedModelError(
            f"No router was found beside the {type(experts).__name__} of {type(block).__name__}: "
            f"expected a module called {' or '.join(ROUTER_NAMES)} with a weight of {n_experts} "
            f"rows, found {', '.join(siblings) or 'nothing'}. Please report this family."
        )
    module = min(candidates, key=_n_rows)
    scoring = family.scoring
    if family.scoring_field is not None:
        scoring = Scoring(getattr(experts.config, family.scoring_field))
    return Router(
        module=module,
        n_experts=n_experts,
        scoring=scoring,
        softcap=float(getattr(module, "router_logit_softcapping", 0.0)),
        reads_experts_input=Trait.OWN_INPUT not in family.traits
        and _has_same_input(module, experts),
    )


def _input_size(experts: nn.Module) -> int:
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    return getattr(experts, first).shape[-2 if experts.is_transposed else -1]


def _has_same_input(router: nn.Module, experts: nn.Module) -> bool:
    """Whether a router reads as many values as the experts, as far as their parameters show."""
    is_known = any(parameter.dim() > 1 for parameter in experts.parameters(recurse=False))
    return not is_known or router.weight.shape[1] == _input_size(experts)  # pyright: ignore


def _n_rows(module: nn.Module) -> int:
    """Return how many rows a module's weight matrix has, 0 where it has none."""
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else 0


def _n_runs(config: PreTrainedConfig, path: str) -> int:
    """Return how often a forward pass runs the decoder layer that a module lies in."""
    text = config.get_text_config()
    first = getattr(text, "loop_layer_index_start", 0)
    end = getattr(text, "loop_layer_index_end", 0)
    return text.loop_num_passes if first <= _layer_number(path) < end else 1


def _check_alike(layers: list[MoELayer], model_type: str) -> None:
    """Refuse layers whose experts differ; a cache slot must hold any expert of the model."""
    shapes = {
        tuple((name, tuple(getattr(layer.experts, name).shape)) for name in layer.parameter_names)
        for layer in layers
    }
    if len(shapes) > 1:
        kinds = "; ".join(str(dict(shape)) for shape in sorted(shapes))
        raise UnsupportedModelError(
            f"This {model_type} model has experts of {len(shapes)} kinds ({kinds}); only models "
            "whose layers all have the same number and shape of experts can be served."
        )


def _layer_number(path: str) -> int:
    match = LAYER_NUMBER.search(path)
    return int(match[1]) if match else -1
