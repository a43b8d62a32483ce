"""How a model routes: use of its experts, predictability of the next layer, and locality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from adapmoe_lab.models.demo_architecture import DemoModel, RoutingTaps


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
    top_k: int
    n_tokens: int

    @classmethod
    def of_pass(cls, model: DemoModel, taps: RoutingTaps, n_sequences: int) -> RoutingStatistics:
        """Read the taps after one forward pass over `n_sequences` sequences of equal length."""
        top_k = model.config.num_experts_per_tok
        chosen = [_chosen(taps.logits[index], top_k) for index in range(len(taps.logits))]  # [T, E]
        recall = [torch.tensor(float("nan"))]
        for index in range(1, len(chosen)):
            router = model.model.layers[index].mlp.gate
            guess = functional.linear(taps.inputs[index - 1].flatten(0, 1), router.weight)
            recall.append(_overlap(_chosen(guess, top_k), chosen[index], top_k))
        by_sequence = [c.unflatten(0, (n_sequences, -1)) for c in chosen]  # [B, S, E]
        locality = [_overlap(c[:, 1:], c[:, :-1], top_k) for c in by_sequence]
        return cls(
            expert_use=torch.stack([c.mean(0) for c in chosen]).double().cpu().numpy(),
            next_router_recall=np.array([value.item() for value in recall]),
            locality=np.array([value.item() for value in locality]),
            top_k=top_k,
            n_tokens=len(chosen[0]),
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
            top_k=parts[0].top_k,
            n_tokens=sum(part.n_tokens for part in parts),
        )

    @property
    def locality_by_chance(self) -> np.ndarray:
        """[L]: locality of tokens that choose alike but independently: K x sum of squares."""
        shares = self.expert_use / self.top_k
        return self.top_k * (shares**2).sum(1)

    def as_dict(self) -> dict[str, object]:
        """Return the statistics as JSON values, rounded to four digits; None where undefined."""
        recall = [None if np.isnan(r) else round(float(r), 4) for r in self.next_router_recall]
        return {
            "n_tokens": self.n_tokens,
            "smallest_expert_use": round(float(self.expert_use.min()), 4),
            "expert_use": self.expert_use.round(4).tolist(),
            "next_router_recall": recall,
            "locality": self.locality.round(4).tolist(),
            "locality_by_chance": self.locality_by_chance.round(4).tolist(),
        }


def _chosen(logits: Tensor, top_k: int) -> Tensor:
    """Return float32[T, E]: 1 where the router chooses the expert."""
    return torch.zeros_like(logits, dtype=torch.float32).scatter_(
        1, logits.float().topk(top_k).indices, 1.0
    )


def _overlap(guess: Tensor, truth: Tensor, top_k: int) -> Tensor:
    return (guess * truth).sum(-1).mean() / top_k
