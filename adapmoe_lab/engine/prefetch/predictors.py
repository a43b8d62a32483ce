"""Predicting which experts a layer will need, before its router has chosen.

Recording and prefetch query the same objects at the same hook points, so that what was recorded is
what prefetch will see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from adapmoe_lab.models.checkpoint.checkpoint import HFModel
from adapmoe_lab.models.families import (
    MoELayer,
    Router,
    UnsupportedModelError,
    router_scores,
    scores_of_logits,
)
from adapmoe_lab.models.hooks.input_norms import find_input_norms
from adapmoe_lab.records import Predictors
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.prefetch import HOOK_POINTS

MAX_DISTANCE = 3
"""The most layers between source and target, as in AdapMoE (arXiv 2408.10284, section 4.2)."""


class Predictor(Protocol):
    """Predicts the router scores of later layers.

    Attributes:
        name: what traces and configs call it.
        hook_point: where it can be queried, and so what it is shown.
    """

    name: str
    hook_point: HookPoint

    def targets(self, layer: int) -> range:
        """Return the layers it can predict from a source layer."""
        ...

    def scores(self, source: int, target: int, x: torch.Tensor) -> torch.Tensor:
        """Return the router scores to expect of the target layer, float32 [T, E]."""
        ...


def likeliest(scores: torch.Tensor, n_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts of the best scores [T, E] and these scores, both [T, C], best first."""
    best = scores.topk(min(n_candidates, scores.shape[-1]), dim=-1)
    return best.indices, best.values


class NextRouter:
    """The target's router on an earlier layer's experts input, AdapMoE's predictor."""

    name = "next_router"
    hook_point = HOOK_POINTS[name]

    def __init__(self, routers: Sequence[Router], max_distance: int = MAX_DISTANCE) -> None:
        """Predict with the routers of all layers."""
        self._routers = routers
        self._max_distance = max_distance

    def targets(self, layer: int) -> range:
        """Return the next layers, as far as its distance goes."""
        return range(layer + 1, min(layer + self._max_distance + 1, len(self._routers)))

    def scores(self, source: int, target: int, x: torch.Tensor) -> torch.Tensor:
        """Return the scores [T, E] that the target's router gives hidden states [T, D]."""
        return router_scores(self._routers[target], x)


class OwnNorm:
    """The next layer's own norm and router on the residual stream: all but its attention."""

    name = "own_norm"
    hook_point = HOOK_POINTS[name]

    def __init__(self, routers: Sequence[Router], norms: Sequence[nn.Module]) -> None:
        """Predict with routers behind the norms, one of each per layer."""
        self._routers = routers
        self._norms = norms

    def targets(self, layer: int) -> range:
        """Return the next layer."""
        return range(layer + 1, min(layer + 2, len(self._routers)))

    def scores(self, source: int, target: int, x: torch.Tensor) -> torch.Tensor:
        """Return the scores [T, E] of a residual stream [T, D]."""
        return router_scores(self._routers[target], self._norms[target](x))


class Ridge:
    """A linear map for every pair of layers, fitted by ridge regression."""

    name = "ridge"
    hook_point = HOOK_POINTS[name]

    def __init__(self, routers: Sequence[Router], fitted: Predictors) -> None:
        """Bring the maps to where the routers are."""
        self._routers = routers
        self._maps = {
            (target - distance, target): _on_device_of(routers[target], weights[target])
            for distance, weights in fitted.ridge.items()
            for target in range(distance, len(routers))
        }

    def targets(self, layer: int) -> range:
        """Return the next layers that were fitted."""
        known = [target for source, target in self._maps if source == layer]
        return range(layer + 1, max(known, default=layer) + 1)

    def scores(self, source: int, target: int, x: torch.Tensor) -> torch.Tensor:
        """Return the scores [T, E] to expect from the experts' input [T, D] of the source."""
        return scores_of_logits(self._routers[target], _affine(self._maps[source, target], x))


class LastHidden:
    """Layer 0 from the last hidden state of the token before, AdapMoE's first-layer gate."""

    name = "last_hidden"
    hook_point = HOOK_POINTS[name]

    def __init__(self, routers: Sequence[Router], fitted: Predictors) -> None:
        """Bring the gate to where the routers are."""
        self._gate = _on_device_of(routers[0], fitted.last_hidden)

    def targets(self, layer: int) -> range:
        """Return layer 0 for layer 0."""
        return _first_layer(layer)

    def scores(self, source: int, target: int, x: torch.Tensor) -> torch.Tensor:
        """Return each expert's share of the scores [T, E], from final hidden states [T, D]."""
        return _affine(self._gate, x).softmax(dim=-1)


class TokenEmbedding:
    """Layer 0's own norm and router on the token's embedding: layer 0 without its attention."""

    name = "token_embedding"
    hook_point = HOOK_POINTS[name]

    def __init__(self, embeddings: nn.Module, router: Router, norm: nn.Module) -> None:
        """Ask layer 0's router behind its norm."""
        self._embeddings = embeddings
        self._router = router
        self._norm = norm

    def targets(self, layer: int) -> range:
        """Return layer 0 for layer 0."""
        return _first_layer(layer)

    def scores(self, source: int, target: int, x: torch.Tensor) -> torch.Tensor:
        """Return the scores [T, E] of token ids [T]."""
        return router_scores(self._router, self._norm(self._embeddings(x)))


class TokenTable:
    """Layer 0's scores as they were for the same token before."""

    name = "token_table"
    hook_point = HOOK_POINTS[name]

    def __init__(
        self, router: Router, fitted: Predictors, unseen: TokenEmbedding | None = None
    ) -> None:
        """Bring the table to where the router is.

        Tokens that are not in it are left to `unseen`; without that, they get the table's mean.
        """
        self._tokens = _on_device_of(router, fitted.table_tokens)
        self._table = _on_device_of(router, fitted.token_table)
        self._mean = self._table.mean(dim=0)
        self._unseen = unseen

    def targets(self, layer: int) -> range:
        """Return layer 0 for layer 0."""
        return _first_layer(layer)

    def scores(self, source: int, target: int, x: torch.Tensor) -> torch.Tensor:
        """Return the scores [T, E] to expect of token ids [T]."""
        places = torch.searchsorted(self._tokens, x.to(self._tokens.dtype))
        places = places.clamp(max=len(self._tokens) - 1)
        is_known = self._tokens[places] == x
        others = self._mean if self._unseen is None else self._unseen.scores(source, target, x)
        return torch.where(is_known[:, None], self._table[places], others)


def predictors_of(
    hf: HFModel, layers: Sequence[MoELayer], fitted: Predictors | None = None
) -> tuple[Predictor, ...]:
    """Return every predictor that can be had of an attached model, fitted ones if given.

    Those that need the layers' own norms are left out where there are none to be found.

    Args:
        hf: the model; it runs a few tokens, but none of its experts.
        layers: its layers with routed experts.
        fitted: what was fitted to this model.
    """
    routers = [layer.router for layer in layers]
    found: list[Predictor] = [NextRouter(routers)]
    embedding = None
    try:
        norms = find_input_norms(hf, layers)
    except UnsupportedModelError:
        pass
    else:
        embedding = TokenEmbedding(hf.get_input_embeddings(), routers[0], norms[0])
        found += [OwnNorm(routers, norms), embedding]
    if fitted is not None:
        table = TokenTable(routers[0], fitted, embedding)
        found += [Ridge(routers, fitted), table, LastHidden(routers, fitted)]
    return tuple(found)


def _first_layer(layer: int) -> range:
    return range(1) if layer == 0 else range(0)


def _on_device_of(router: Router, array: torch.Tensor) -> torch.Tensor:
    weight: torch.Tensor = router.module.weight  # pyright: ignore[reportAssignmentType]
    return torch.tensor(array, device=weight.device)


def _affine(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Apply a map [D+1, n], its last row the constant, to x [T, D]."""
    return torch.addmm(weights[-1], x.float(), weights[:-1]).float()  # autocast may round it
