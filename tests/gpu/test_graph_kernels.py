"""Kernels of a captured step against what they are written after: the device table, and torch.

On a GPU; without one in Triton's interpreter, as `tests/engine/test_graph_interpreted.py` does.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted_graph import DEVICE, IS_INTERPRETED, NEEDS_DEVICE
from toy_policies import TOY

from adapmoe_lab.policies.eviction.device_table import DeviceTable
from adapmoe_lab.policies.eviction.fixed_point import FIXED_SCORES, mean_score, token_weight
from adapmoe_lab.policies.eviction.registry import POLICIES
from adapmoe_lab.policies.gating.keep import gated_weights, keep_by_cuts
from adapmoe_lab.records import CachePlan, GatingTable
from adapmoe_lab.records.gating_table import QUANTITIES

pytestmark = NEEDS_DEVICE

ON_DEVICE = [policy for policy in [*POLICIES.values(), TOY] if not policy.host_only]
SLOTS = [(0, 1, 5)] if IS_INTERPRETED else [(0, 1, 5), (0, 0, 0), (9, 11, 12)]
SHAPES = [(8, 40), (7, 1000), *([] if IS_INTERPRETED else [(96, 40), (2048, 1536)])]
LENGTH = 1 if IS_INTERPRETED else 12
"""How much longer than in the interpreter, where a step takes long, runs are."""

HOST, SLOT = 10**6, 2 * 10**6
"""Where the made-up addresses of experts and slots begin."""


def on_device(values, dtype=torch.int64):
    return torch.as_tensor(np.asarray(values), dtype=dtype, device=DEVICE)


class Steps:
    """Steps by the kernel and by the device table, at made-up addresses."""

    def __init__(self, policy, slots, shape, top_k, is_global=False, gating=None, seed=4):
        from adapmoe_lab.engine.graph.step_tables import StepTables

        self.rng = np.random.default_rng(seed)
        self.n_layers, self.n_experts = shape
        self.top_k, self.policy, self.gating = top_k, policy, gating
        pins = [set(range(max(0, n - 1))) for n in slots]
        self.plan = CachePlan(
            np.array(slots), None, None, "test", is_global=is_global,
            pinned=pins if policy.pins else None,
        )  # fmt: skip
        self.table = DeviceTable(self.plan, self.n_experts, policy)
        self.hosts = HOST + np.arange(self.n_layers * self.n_experts).reshape(shape)
        counts = [self.plan.pool_slots(pool) for pool in range(self.plan.n_pools)]
        self.width = max(counts)
        self.slots = [
            [SLOT + pool * self.width + slot for slot in range(n)] for pool, n in enumerate(counts)
        ]
        self.found = StepTables(self.hosts, policy, is_global, top_k, torch.device(DEVICE))
        self.found.begin(self.plan, self.slots, gating)
        self.counts = np.zeros((3, self.n_layers), dtype=np.int64)

    def routing(self, has_none=False):
        """Return drawn ids, weights and scores of one step."""
        scores = self.rng.dirichlet(np.full(self.n_experts, 0.3)).astype(np.float32)
        ids = self.rng.choice(self.n_experts, self.top_k, replace=False)
        weights = scores[ids] + np.float32(1e-3)
        if has_none:
            ids[self.rng.integers(self.top_k)] = self.n_experts
        return ids, weights, scores

    def kept(self, layer, ids, weights):
        keep = ids < self.n_experts
        if self.gating is not None:
            cuts, quantity = self.gating.cuts[layer], self.gating.quantity
            keep &= keep_by_cuts(weights[None], cuts, quantity)[0]
        return keep

    def step(self, layer, has_none=False):
        """Run a step in both; check what is to be read, and where it is to be written."""
        ids, weights, scores = self.routing(has_none)
        keep = self.kept(layer, ids, weights)
        real, before = np.sort(ids[keep]), self.table.slot_of[layer].copy()
        expected = self.table.step(layer, real, scores[None])
        found = self.found.decide(
            layer, on_device(ids), on_device(weights, torch.float32),
            on_device(scores, torch.float32),
        )  # fmt: skip
        addresses = self.slots[0 if self.plan.is_global else layer]
        reads = [
            addresses[before[e]] if is_hit else self.hosts[layer, e]
            for e, is_hit in zip(real, expected.is_hit, strict=True)
        ]
        writes = [
            addresses[slot] if slot >= 0 and not is_hit else 0
            for slot, is_hit in zip(expected.slot, expected.is_hit, strict=True)
        ]
        none = [0] * int((~keep).sum())
        assert found.reads.tolist() == [*reads, *none]
        assert found.writes.tolist() == [*writes, *none]
        columns = found.columns.tolist()
        assert sorted(columns) == list(range(self.top_k))
        assert ids[columns[: len(real)]].tolist() == real.tolist()
        self.check_coefficients(found.coefficients.cpu().numpy(), weights, keep)
        n_hits = expected.is_hit.sum()
        self.counts[:, layer] += n_hits, len(real) - n_hits, len(none)

    def check_coefficients(self, coefficients, weights, keep):
        if self.gating is not None and self.gating.renormalise:
            wanted = gated_weights(weights[None], keep[None], renormalise=True)[0]
            np.testing.assert_allclose(coefficients, wanted, rtol=1e-6)
        else:
            np.testing.assert_array_equal(coefficients, weights * keep)

    def check_tables(self):
        state = self.found.state()
        np.testing.assert_array_equal(state.slot_of, self.table.slot_of)
        np.testing.assert_array_equal(state.priorities, self.table.priority)
        assert list(state.clocks) == self.table.clock.tolist()
        np.testing.assert_array_equal(self.found.counts, self.counts)


@pytest.mark.parametrize("is_global", [False, True], ids=["by layer", "shared"])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("policy", ON_DEVICE, ids=lambda policy: policy.name)
def test_residency_is_that_of_the_device_table(policy, slots, is_global):
    steps = Steps(policy, slots, (3, 12), 4, is_global)
    steps.table.clock[:] = 2**40  # however long it has run
    steps.found.take_over(steps.table.state)
    for number in range(9 * LENGTH):
        steps.step(number % 3, has_none=number % 7 == 0)
    steps.check_tables()
    state = steps.found.state()
    left = np.argwhere(state.slot_of >= 0)[::3]
    state.slot_of[tuple(left.T)] = -1  # as after a step that was interrupted
    for one in (steps.table, steps.found):
        one.take_over(state)
    for number in range(6 * LENGTH):
        steps.step(number % 3)
    steps.check_tables()


@pytest.mark.parametrize(("n_experts", "top_k"), [(128, 8), (256, 8), (60, 1)])
@pytest.mark.parametrize("is_global", [False, True], ids=["by layer", "shared"])
def test_any_number_of_experts_is_served(n_experts, top_k, is_global):
    slots = (n_experts // 32, n_experts // 20)
    steps = Steps(POLICIES["lfu_aged"], slots, (2, n_experts), top_k, is_global)
    for number in range(4 * LENGTH):
        steps.step(number % 2)
    steps.check_tables()


@pytest.mark.parametrize("is_renormalised", [False, True])
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_what_is_kept_is_what_the_table_of_cuts_keeps(top_k, quantity, is_renormalised):
    cuts = np.random.default_rng(2).uniform(0.3, 1.1, (2, top_k - 1))
    gating = GatingTable(cuts, is_renormalised, quantity)
    steps = Steps(POLICIES["lru"], (6, 9), (2, 20), top_k, gating=gating)
    for number in range(2 * LENGTH):
        steps.step(number % 2)
    steps.found.gate(None)
    steps.gating = None
    steps.step(0)
    steps.check_tables()


def share_of_three_best(shares):
    ranked = -np.sort(-shares)
    return ranked[0] + ranked[1] + ranked[2]


def test_a_share_just_at_its_cut_is_kept_as_on_the_host():
    rng = np.random.default_rng(7)
    n_steps = 0
    while n_steps < 6 * LENGTH:
        weights = (rng.uniform(0.2, 2) * rng.dirichlet(np.ones(6))).astype(np.float32)
        total = sum(weights, np.float32(0))
        together = share_of_three_best(weights / total)
        if share_of_three_best(weights * (np.float32(1) / total)) >= together:
            continue  # a division rounded twice would reach the cut too
        cuts = np.full((1, 5), together)
        cuts[0, 3] = np.nextafter(together, np.float32(0))
        steps = Steps(POLICIES["lru"], (3,), (1, 20), 6, gating=GatingTable(cuts))
        steps.routing = lambda has_none, weights=weights: (np.arange(6), weights, weights)
        steps.step(0)
        n_steps += 1


def test_scores_are_rounded_as_a_trace_keeps_them():
    bits = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    steps = Steps(POLICIES["router_average"], (0,) * 16, (16, 2**12), 1)
    for layer, scores in enumerate(bits.reshape(16, -1)):
        one = on_device([1.0], torch.float32)
        steps.found.decide(layer, on_device([0]), one, on_device(scores, torch.float32))
    wanted = mean_score(FIXED_SCORES.astype(np.int64), token_weight(1))
    np.testing.assert_array_equal(steps.found.state().priorities.ravel(), wanted)


def test_a_rehearsal_changes_nothing():
    steps = Steps(POLICIES["lfu_aged"], (3, 3), (2, 20), 5)
    steps.step(0)
    before, ids = steps.found.state(), on_device([1, 7, 8, 9, 10])
    steps.found.rehearse(True)
    decision = steps.found.decide(0, ids, on_device(np.ones(5), torch.float32))
    assert decision.writes.tolist() == [0] * 5
    after = steps.found.state()
    assert (before.slot_of == after.slot_of).all()
    assert (before.priorities == after.priorities).all()
    assert before.clocks == after.clocks
    steps.check_tables()


@pytest.mark.parametrize(("n_rows", "n_columns"), SHAPES)
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_equal_torchs_and_are_written_through(n_rows, n_columns, is_shared, dtype):
    from adapmoe_lab.engine.graph.operators import served_product

    torch.manual_seed(2)
    offset = 16
    size = offset + n_rows * n_columns
    experts = torch.randn((3, size), device=DEVICE).to(dtype)
    slots = torch.zeros((3, size), dtype=dtype, device=DEVICE)
    x = torch.randn((1 if is_shared else 4, n_columns), device=DEVICE).to(dtype)
    reads = on_device([experts[0].data_ptr(), experts[1].data_ptr(), experts[2].data_ptr(), 0])
    writes = on_device([0, slots[1].data_ptr(), slots[2].data_ptr(), 0])
    columns = on_device([2, 0, 1, 3], torch.int32)
    out = served_product(reads, writes, columns, x, offset, n_rows, n_columns)
    for rank, column in enumerate([2, 0, 1]):
        matrix = experts[rank, offset:].view(n_rows, n_columns).float()
        expected = matrix @ x[0 if is_shared else column].float()
        torch.testing.assert_close(out[column].float(), expected, rtol=1e-2, atol=1e-2)
    assert not slots[0].any()
    for rank in (1, 2):
        assert torch.equal(slots[rank, offset:], experts[rank, offset:])
        assert not slots[rank, :offset].any()
