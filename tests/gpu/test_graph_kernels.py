"""Kernels of a captured step against what they are written after: the device table, and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapmoe_lab.policies.eviction.device_table import DeviceTable
from adapmoe_lab.policies.eviction.registry import POLICIES
from adapmoe_lab.records import CachePlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

N_LAYERS, N_EXPERTS, TOP_K = 2, 24, 5
HOST, SLOT = 10**6, 2 * 10**6
"""Where the made-up addresses of experts and slots begin."""


def on_gpu(values, dtype=torch.int64):
    return torch.as_tensor(np.asarray(values), dtype=dtype, device="cuda")


class Tables:
    """The tensors of `lru_step_kernel` for made-up addresses."""

    def __init__(self, n_slots):
        self.width = max(1, *n_slots)
        shape = (N_LAYERS, self.width)
        self.owner = torch.full(shape, -1, dtype=torch.int32, device="cuda")
        self.priority = on_gpu(np.zeros(shape))
        self.clocks, self.hits, self.misses = on_gpu(np.zeros((3, N_LAYERS)))
        self.n_slots = on_gpu(n_slots, torch.int32)
        self.experts = on_gpu(HOST + np.arange(N_LAYERS * N_EXPERTS).reshape(N_LAYERS, -1))
        self.slots = on_gpu(SLOT + np.arange(N_LAYERS * self.width).reshape(N_LAYERS, -1))
        self.reads, self.writes = on_gpu(np.zeros((2, TOP_K)))
        self.columns = on_gpu(np.zeros(TOP_K), torch.int32)
        self.is_rehearsal = on_gpu([0], torch.int32)

    def step(self, layer, ids):
        import triton

        from adapmoe_lab.engine.graph.kernels import lru_step_kernel

        lru_step_kernel[(1,)](
            on_gpu(ids), self.owner, self.priority, self.clocks, self.hits, self.misses,
            self.n_slots, self.experts, self.slots, self.reads, self.writes, self.columns,
            self.is_rehearsal, layer, N_EXPERTS, self.width, triton.next_power_of_2(self.width),
            TOP_K, triton.next_power_of_2(TOP_K), num_warps=1,
        )  # fmt: skip
        return [tensor.tolist() for tensor in (self.reads, self.writes, self.columns)]


@pytest.mark.parametrize("n_slots", [(0, 0), (1, 3), (4, 5), (9, 16), (24, 20)])
def test_residency_is_that_of_the_device_table(n_slots):
    rng = np.random.default_rng(4)
    found = Tables(n_slots)
    plan = CachePlan(np.array(n_slots), None, None, "test")
    table = DeviceTable(plan, N_EXPERTS, POLICIES["lru"])
    hits = misses = 0
    for number in range(400):
        layer = number % N_LAYERS
        ids = rng.choice(N_EXPERTS, TOP_K, replace=False)
        if number % 7 == 0:
            ids[rng.integers(TOP_K)] = N_EXPERTS  # no expert
        before = table.slot_of[layer].copy()
        real = np.sort(ids[ids < N_EXPERTS])
        expected = table.step(layer, real)
        reads, writes, columns = found.step(layer, ids)
        for rank, expert in enumerate(real.tolist()):
            slot, first = int(expected.slot[rank]), SLOT + layer * found.width
            if expected.is_hit[rank]:
                assert (reads[rank], writes[rank]) == (first + before[expert], 0)
            else:
                assert reads[rank] == HOST + layer * N_EXPERTS + expert
                assert writes[rank] == (first + slot if slot >= 0 else 0)
            assert ids[columns[rank]] == expert
        assert reads[len(real) :] == [0] * (TOP_K - len(real))
        hits, misses = hits + expected.is_hit.sum(), misses + (~expected.is_hit).sum()
    assert (int(found.hits.sum()), int(found.misses.sum())) == (hits, misses)
    assert found.clocks.tolist() == table.clock.tolist()
    owner = found.owner.cpu().numpy()
    for layer, slot in np.argwhere(owner >= 0):
        expert = owner[layer, slot]
        assert table.slot_of[layer, expert] == slot
        assert table.priority[layer, expert] == int(found.priority[layer, slot])
    assert (owner >= 0).sum() == (table.slot_of >= 0).sum()


def test_a_rehearsal_changes_nothing():
    found = Tables((3, 3))
    found.step(0, [1, 2, 3, 4, 5])
    before = [t.clone() for t in (found.owner, found.priority, found.clocks, found.hits)]
    found.is_rehearsal.fill_(1)
    reads, writes, _ = found.step(0, [1, 7, 8, 9, 10])
    assert writes == [0] * TOP_K
    assert reads[0] == SLOT
    after = [found.owner, found.priority, found.clocks, found.hits]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("n_rows", "n_columns"), [(64, 64), (96, 40), (7, 1000), (2048, 1536)])
@pytest.mark.parametrize("is_shared", [False, True])
def test_products_equal_torchs_and_are_written_through(n_rows, n_columns, is_shared):
    import triton

    from adapmoe_lab.engine.graph.kernels import served_product_kernel

    torch.manual_seed(2)
    offset = 16
    size = offset + n_rows * n_columns
    experts = torch.randn((3, size), device="cuda").bfloat16()
    slots = torch.zeros((3, size), dtype=torch.bfloat16, device="cuda")
    x = torch.randn((1 if is_shared else 4, n_columns), device="cuda").bfloat16()
    reads = on_gpu([experts[0].data_ptr(), experts[1].data_ptr(), experts[2].data_ptr(), 0])
    writes = on_gpu([0, slots[1].data_ptr(), slots[2].data_ptr(), 0])
    columns = on_gpu([2, 0, 1, 3], torch.int32)
    out = torch.full((4, n_rows), 7.0, dtype=torch.bfloat16, device="cuda")
    served_product_kernel[(triton.cdiv(n_rows, 4), 4)](
        reads, writes, columns, offset, x, 0 if is_shared else n_columns, out, n_rows, n_columns,
        4, min(1024, triton.next_power_of_2(n_columns)), num_warps=4,
    )  # fmt: skip
    for rank, column in enumerate([2, 0, 1]):
        matrix = experts[rank, offset:].view(n_rows, n_columns).float()
        expected = matrix @ x[0 if is_shared else column].float()
        torch.testing.assert_close(out[column].float(), expected, rtol=1e-2, atol=1e-2)
    assert (out[3] == 7).all()
    assert not slots[0].any()
    for rank in (1, 2):
        assert torch.equal(slots[rank, offset:], experts[rank, offset:])
        assert not slots[rank, :offset].any()
