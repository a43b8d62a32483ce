"""What is skipped under a configuration, and what is computed in its place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.host_driven.surrogates import SurrogateOutputs
from adapmoe_lab.policies.gating.keep import gated_weights, keep_by_cuts
from adapmoe_lab.records import GatingTable
from adapmoe_lab.records.files import digest
from adapmoe_lab.records.routing import UNGATED

Routing = tuple[NDArray[np.int64], NDArray[np.float32]]
"""The router's choice [T, K], E meaning no expert, and its own weights [T, K], on the host."""


@dataclass(frozen=True, eq=False)
class Skipping:
    """A gating and surrogates; neither skips nothing.

    Attributes:
        gating: which experts are skipped.
        outputs: what is computed in their place.
    """

    gating: GatingTable | None = None
    outputs: SurrogateOutputs | None = None

    def fingerprint(self) -> str:
        """Identify what is skipped and what is computed instead; `UNGATED` if nothing is."""
        if self.gating is None:
            return UNGATED
        if self.outputs is None:
            return self.gating.fingerprint()
        return digest(self.gating.fingerprint(), self.outputs.surrogates.fingerprint())

    def kept(
        self, layer: int, routing: Routing, top_k_weights: torch.Tensor, n_experts: int
    ) -> tuple[NDArray[np.bool_], torch.Tensor]:
        """Return which of a layer's chosen experts are run, bool [T, K], and their weights [T, K].

        Args:
            layer: number of the MoE layer.
            routing: see `Routing`.
            top_k_weights: the weights [T, K] as the experts get them.
            n_experts: E.
        """
        indices, weights = routing
        keep = indices < n_experts
        if self.gating is None:
            return keep, top_k_weights
        keep &= keep_by_cuts(weights, self.gating.cuts[layer], self.gating.quantity)
        if self.gating.renormalise:
            scaled = gated_weights(weights, keep, renormalise=True)
            top_k_weights = torch.from_numpy(scaled).to(top_k_weights)
        return keep, top_k_weights

    def completed(
        self,
        layer: int,
        hidden: torch.Tensor,
        output: torch.Tensor,
        routing: Routing,
        keep: NDArray[np.bool_],
    ) -> torch.Tensor:
        """Return a layer's output [T, D], what surrogates give for skipped experts included."""
        if self.outputs is None:
            return output
        return self.outputs.complete(layer, hidden, output, routing, keep)
