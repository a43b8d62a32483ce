"""One token's experts on the device: residency, reads and write-through without the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import nn

from adapmoe_lab.engine.graph.kernels import lru_step_kernel, served_product_kernel
from adapmoe_lab.engine.store.expert_store import ExpertStore
from adapmoe_lab.policies.eviction.expert_cache import CacheState

ROWS_AT_ONCE, COLUMNS_AT_ONCE = 4, 1024


class ServedStep:
    """Runs the experts of one token from slots and pinned memory, as recorded in device tables.

    It owns residency between `take_over` and `state`; its counters go on until they are cleared.
    """

    def __init__(
        self, store: ExpertStore, slots: Sequence[torch.Tensor], top_k: int, device: torch.device
    ) -> None:
        """Address every expert of a pinned store and every slot.

        Args:
            store: all experts, in bfloat16 and in pinned memory.
            slots: uint8 [S, bytes] of every layer.
            top_k: experts that a token chooses.
            device: where to compute.
        """
        n_layers, n_experts = store.expert_bytes.shape
        self._n_slots = [len(layer) for layer in slots]
        self._store = store
        width = max([1, *self._n_slots])
        places = np.zeros((n_layers, width), dtype=np.int64)
        for layer, buffers in enumerate(slots):
            places[layer, : len(buffers)] = [buffer.data_ptr() for buffer in buffers]
        hosts = [store.buffer(*number).data_ptr() for number in store.numbers()]
        self._fields = {field.name: field for field in store.formats[0][0].fields}

        def on_device(values: object, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.as_tensor(np.asarray(values), dtype=dtype, device=device)

        self._host_addresses = on_device(hosts).view(n_layers, n_experts)
        self._slot_addresses = on_device(places)
        self._slot_counts = on_device(self._n_slots, torch.int32)
        self._owner = torch.full((n_layers, width), -1, dtype=torch.int32, device=device)
        self._priority = on_device(np.zeros((n_layers, width)))
        self._clocks = on_device(np.zeros(n_layers))
        self._hits, self._misses = on_device(np.zeros((2, n_layers)))
        self._reads, self._writes = on_device(np.zeros((2, top_k)))
        self._columns = on_device(np.zeros(top_k), torch.int32)
        self._is_rehearsal = on_device([0], torch.int32)

    @property
    def counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Hits and misses of every layer, int64 [L] each; waits for the device."""
        hits, misses = torch.stack([self._hits, self._misses]).cpu().numpy()
        return hits, misses

    def rehearse(self, is_rehearsal: bool) -> None:
        """Let the next steps change neither residency nor counters, or let them again."""
        self._is_rehearsal.fill_(int(is_rehearsal))

    def take_over(self, state: CacheState) -> None:
        """Go on from the residency that the host knows."""
        owner = np.full(self._owner.shape, -1, dtype=np.int32)
        priority = np.zeros(owner.shape, dtype=np.int64)
        layers, experts = np.nonzero(state.slot_of >= 0)
        slots = state.slot_of[layers, experts]
        owner[layers, slots] = experts
        priority[layers, slots] = state.priorities[layers, experts]
        self._owner.copy_(torch.from_numpy(owner))
        self._priority.copy_(torch.from_numpy(priority))
        self._clocks.copy_(torch.tensor(state.clocks))

    def state(self) -> CacheState:
        """Return residency for the host to go on from; waits for the device."""
        owner, priority = self._owner.cpu().numpy(), self._priority.cpu().numpy()
        slot_of = np.full(self._host_addresses.shape, -1)
        priorities = np.zeros(slot_of.shape, dtype=np.int64)
        layers, slots = np.nonzero(owner >= 0)
        slot_of[layers, owner[layers, slots]] = slots
        priorities[layers, owner[layers, slots]] = priority[layers, slots]
        return CacheState(slot_of, priorities, tuple(self._clocks.tolist()))

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
            hidden: bfloat16 [1, D].
            top_k_index: int64 [1, K]; E means no expert.
            top_k_weights: [1, K].
        """
        n_experts, width = self._host_addresses.shape[1], self._owner.shape[1]
        ids = top_k_index[0].long().contiguous()
        lru_step_kernel[(1,)](
            ids, self._owner, self._priority, self._clocks, self._hits, self._misses,
            self._slot_counts, self._host_addresses, self._slot_addresses, self._reads,
            self._writes, self._columns, self._is_rehearsal, layer,
            n_experts, width, triton.next_power_of_2(width), len(ids),
            triton.next_power_of_2(len(ids)), num_warps=1,
        )  # fmt: skip
        inner = experts._apply_gate(self._product("gate_up_proj", hidden, len(ids), 0))
        inner = inner.contiguous()
        outputs = self._product("down_proj", inner, len(ids), inner.shape[1])
        weighted = outputs[None] * top_k_weights[..., None]
        is_expert = (top_k_index < n_experts)[..., None]
        return torch.where(is_expert, weighted, 0).sum(dim=1).to(hidden.dtype)

    def _product(self, name: str, x: torch.Tensor, top_k: int, x_stride: int) -> torch.Tensor:
        """Return a matrix of every chosen expert times its vector, bfloat16 [K, N]."""
        field = self._fields[name]
        n_rows, n_columns = field.matrix_shape
        out = torch.empty((top_k, n_rows), dtype=x.dtype, device=x.device)
        grid = triton.cdiv(n_rows, ROWS_AT_ONCE), top_k
        served_product_kernel[grid](
            self._reads, self._writes, self._columns, field.offset // torch.bfloat16.itemsize, x,
            x_stride, out, n_rows, n_columns, ROWS_AT_ONCE,
            min(COLUMNS_AT_ONCE, triton.next_power_of_2(n_columns)), num_warps=4,
        )  # fmt: skip
        return out
