"""One token's experts on the device: residency, reads and write-through without the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from adapmoe_lab.engine.graph.operators import Decision, served_product
from adapmoe_lab.engine.graph.step_tables import StepTables
from adapmoe_lab.engine.host_driven.surrogates import SurrogateOutputs
from adapmoe_lab.engine.store.expert_store import ExpertStore
from adapmoe_lab.models.families import Router, router_scores
from adapmoe_lab.policies.eviction.policy import EvictionPolicy
from adapmoe_lab.records import CachePlan, GatingTable

COMPUTED_BYTES = 2
"""Of a number, in every precision that a captured step computes in."""


class ServedStep:
    """Runs the experts of one token from slots and pinned memory, as the tables say.

    Attributes:
        tables: who is resident, what is skipped, and the counters.
    """

    def __init__(
        self,
        store: ExpertStore,
        policy: EvictionPolicy,
        is_shared: bool,
        top_k: int,
        device: torch.device,
        routers: Sequence[Router] = (),
        surrogates: SurrogateOutputs | None = None,
    ) -> None:
        """Address every expert of a pinned store; `begin` gives it slots.

        Args:
            store: all experts, in pinned memory and in the precision that is computed in.
            policy: who leaves first.
            is_shared: whether the layers share their slots.
            top_k: experts that a token chooses.
            device: where to compute.
            routers: of every layer; used only for policies that read scores.
            surrogates: what is computed in the place of skipped experts.
        """
        hosts = [
            [store.buffer(layer, expert).data_ptr() for expert in range(store.n_experts(layer))]
            for layer in range(store.n_layers)
        ]
        self.tables = StepTables(hosts, policy, is_shared, top_k, device)
        self._routers = routers if policy.needs_scores else None
        self._surrogates = surrogates
        self._matrices = {
            field.name: (field.offset // COMPUTED_BYTES, *field.matrix_shape)
            for field in store.formats[0][0].fields
        }

    def begin(
        self, plan: CachePlan, slots: Sequence[torch.Tensor], gating: GatingTable | None
    ) -> None:
        """Start afresh with a plan's empty slots, uint8 [S, bytes] of every pool."""
        addresses = [[slot.data_ptr() for slot in pool] for pool in slots]
        self.tables.begin(plan, addresses, gating)

    def run_layer(
        self,
        layer: int,
        experts: nn.Module,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return the summed outputs [1, D] of one token's experts, without asking the host.

        Args:
            layer: number of the MoE layer.
            experts: the transformers experts module, for its activation.
            hidden: [1, D].
            top_k_index: int64 [1, K]; E means no expert.
            top_k_weights: [1, K].
        """
        ids, weights = top_k_index[0].long().contiguous(), top_k_weights[0].contiguous()
        scores = None
        if self._routers is not None:
            scores = router_scores(self._routers[layer], hidden)[0].contiguous()
        decision = self.tables.decide(layer, ids, weights, scores)
        inner = experts._apply_gate(self._product("gate_up_proj", hidden, decision))
        outputs = self._product("down_proj", inner.contiguous(), decision)
        coefficients = decision.coefficients.to(weights.dtype)[:, None]
        is_run = coefficients != 0
        weighted = torch.where(is_run, outputs * coefficients, 0)  # [K, D]
        output = weighted.sum(dim=0, keepdim=True)
        if self._surrogates is not None:
            routing = ids, torch.where(is_run[:, 0], weights.float(), 0)
            output = self._surrogates.complete_token(
                layer, hidden, output, routing, decision.dropped
            )
        return output.to(hidden.dtype)

    def _product(self, name: str, x: torch.Tensor, decision: Decision) -> torch.Tensor:
        """Return a matrix of every chosen expert times its vector, [K, N]."""
        matrix = self._matrices[name]
        return served_product(decision.reads, decision.writes, decision.columns, x, *matrix)
