"""How a model routes: use of its experts, predictability of the next layer, and locality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional

from adapmoe_lab.models.demo_architecture import DemoModel, RoutingTaps
from adapmoe_lab.simulation.statistics.routing_patterns import (
    expert_use,
    locality,
    locality_by_chance,
    overlap,
)


@dataclass(frozen=True)
class RoutingStatistics:
    """Routing of some text, per layer; averaging averages the parts, weighted by tokens.

    `expert_use` [L, E]: share of the layer's tokens that use the expert; a row sums to top-k.
    `next_router_recall` [L]: share of a layer's experts found by applying its router to the input
    of the layer before (AdapMoE's predictor); NaN for layer 0, which has none before it.
    `locality` [L]: share of a token's experts that the token before used too.
    """

    expert_use: np.ndarray
    next_router_recall: np.ndarray
    locality: np.ndarray
    n_tokens: int

    @classmethod
    def of_pass(cls, model: DemoModel, taps: RoutingTaps, n_sequences: int) -> RoutingStatistics:
        """Read the taps after one forward pass over `n_sequences` sequences of equal length."""
        config = model.config
        n_layers, top_k = len(taps.logits), config.num_experts_per_tok
        chosen = np.stack([_best(taps.logits[i], top_k) for i in range(n_layers)], axis=1)
        predicted = [
            _best(functional.linear(taps.inputs[i - 1].flatten(0, 1), layer.mlp.gate.weight), top_k)
            for i, layer in enumerate(model.model.layers)
            if i > 0
        ]
        recall = overlap(chosen[:, 1:], np.stack(predicted, axis=1))
        starts = np.arange(n_sequences) * (len(chosen) // n_sequences)
        return cls(
            expert_use=expert_use(chosen, config.num_local_experts),
            next_router_recall=np.concatenate([[np.nan], recall]),
            locality=locality(chosen, starts),
            n_tokens=len(chosen),
        )

    @classmethod
    def mean_of(
        cls, parts: Sequence[RoutingStatistics], *, by_tokens: bool = True
    ) -> RoutingStatistics:
        """Average over parts, weighted by their tokens, or with equal weight."""
        weights = [part.n_tokens if by_tokens else 1 for part in parts]
        return cls(
            expert_use=np.average([p.expert_use for p in parts], axis=0, weights=weights),
            next_router_recall=np.average(
                [p.next_router_recall for p in parts], axis=0, weights=weights
            ),
            locality=np.average([p.locality for p in parts], axis=0, weights=weights),
            n_tokens=sum(part.n_tokens for part in parts),
        )

    def as_dict(self) -> dict[str, object]:
        """Return the statistics as JSON values, rounded to four digits; None where undefined."""
        recall = [None if np.isnan(r) else round(float(r), 4) for r in self.next_router_recall]
        return {
            "n_tokens": self.n_tokens,
            "smallest_expert_use": round(float(self.expert_use.min()), 4),
            "expert_use": self.expert_use.round(4).tolist(),
            "next_router_recall": recall,
            "locality": self.locality.round(4).tolist(),
            "locality_by_chance": locality_by_chance(self.expert_use).round(4).tolist(),
        }


def _best(logits: Tensor, top_k: int) -> np.ndarray:
    """Return int64 [T, K]: the experts the router [T, E] chooses."""
    return logits.float().topk(top_k).indices.cpu().numpy()
