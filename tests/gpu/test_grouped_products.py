"""Products of many tokens with many experts at once, against torch's, one expert after another.

On a GPU; without one in Triton's interpreter, as `tests/engine/test_grouped.py` does.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from interpreted import multiplying_bfloat16
from interpreted_graph import DEVICE, IS_INTERPRETED, NEEDS_DEVICE

pytestmark = NEEDS_DEVICE

GEOMETRIES = [(5, 40, 24), (4, 33, 129), *([] if IS_INTERPRETED else [(64, 2048, 1024)])]
"""Experts, hidden size and width."""

OFFSET = 16
TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _as_a_gpu_multiplies():
    with multiplying_bfloat16() if IS_INTERPRETED else nullcontext():
        yield


class Layer:
    """Experts that lie apart from each other, and a routing that leaves some of them out."""

    def __init__(self, geometry, n_tokens, top_k, dtype, seed=3):
        torch.manual_seed(seed)
        self.n_experts, self.hidden_size, self.width = geometry
        self.shapes = (2 * self.width, self.hidden_size), (self.hidden_size, self.width)
        size = OFFSET + sum(rows * columns for rows, columns in self.shapes) + OFFSET
        stride = size + -size % 128
        drawn = torch.randn((self.n_experts, stride), device=DEVICE) / self.hidden_size**0.5
        self.experts = drawn.to(dtype)
        self.hidden = torch.randn((n_tokens, self.hidden_size), device=DEVICE).to(dtype)
        self.weights = torch.rand((n_tokens, top_k), device=DEVICE)
        rng = np.random.default_rng(seed)
        drawn = rng.random((n_tokens, self.n_experts))
        drawn[:, 1] = -1.0  # chosen only where there is no other
        self.indices = np.argsort(-drawn, axis=1)[:, :top_k]
        self.indices[rng.random(self.indices.shape) < 0.2] = self.n_experts
        self.keep = self.indices < self.n_experts

    def offsets(self):
        rows, columns = self.shapes[0]
        second = OFFSET + rows * columns
        return OFFSET, second + -second % 8

    def matrices(self, expert):
        return [
            self.experts[expert, at : at + rows * columns].view(rows, columns)
            for at, (rows, columns) in zip(self.offsets(), self.shapes, strict=True)
        ]

    def expected(self):
        """Return the first products by place [T, K, 2 width], and the weighted last ones."""
        first = torch.zeros((*self.indices.shape, 2 * self.width), dtype=self.hidden.dtype)
        last = torch.zeros((*self.indices.shape, self.hidden_size))
        for token, column in np.argwhere(self.keep).tolist():
            up, down = self.matrices(self.indices[token, column])
            first[token, column] = up @ self.hidden[token]
            inner = first[token, column, : self.width].to(DEVICE)
            last[token, column] = (down @ inner).float() * self.weights[token, column]
        return first.float(), last


def run(layer, order, groups, tile):
    """Return what the kernel gives for experts in an order, in groups: by place, as expected."""
    import triton

    from adapmoe_lab.engine.host_driven.grouped import group_table
    from adapmoe_lab.engine.host_driven.grouped_kernel import grouped_product_kernel

    addresses = [layer.experts[expert].data_ptr() for expert in order]
    table = group_table(layer.indices, layer.keep, order, addresses, tile.tokens)
    numbers = torch.from_numpy(table.numbers).to(DEVICE)
    dtype, top_k = layer.hidden.dtype, layer.indices.shape[1]
    n_rows = int(table.first_rows[-1])
    found = torch.full((n_rows, 2 * layer.width), 9.0, dtype=dtype, device=DEVICE)
    parts = torch.zeros((*layer.indices.shape, layer.hidden_size), device=DEVICE)

    def product(begin, end, number, x, out):
        rows, columns = layer.shapes[number]
        tiles = table.first_tiles[[begin, end]].tolist()
        grouped_product_kernel[(tiles[1] - tiles[0], triton.cdiv(rows, tile.rows))](
            numbers, table.rows_at, tiles[0], int(table.first_rows[begin]),
            layer.offsets()[number], x, layer.weights, out, rows, columns, top_k, number == 1,
            tile.tokens, tile.rows, tile.columns, num_warps=tile.n_warps,
            num_stages=tile.n_stages,
        )  # fmt: skip

    begin = 0
    for size in groups:
        rows = slice(*table.first_rows[[begin, begin + size]].tolist())
        inner = torch.full_like(found[rows], 9.0)
        product(begin, begin + size, 0, layer.hidden, inner)
        found[rows] = inner
        product(begin, begin + size, 1, inner[:, : layer.width].contiguous(), parts)
        begin += size
    by_place = torch.zeros((layer.keep.size, 2 * layer.width), dtype=dtype, device=DEVICE)
    by_place[numbers[table.rows_at :]] = found
    return by_place.view(*layer.indices.shape, -1).cpu().float(), parts.cpu()


def check(layer, tile):
    needed = np.unique(layer.indices[layer.keep]).tolist()
    found = run(layer, needed, [len(needed)], tile)
    for product, expected in zip(found, layer.expected(), strict=True):
        scale = expected.abs().max()
        assert (product - expected).abs().max() <= TOLERANCE[layer.hidden.dtype] * scale
        assert not product[~torch.from_numpy(layer.keep)].any()
    order = needed[::-1]
    again = run(layer, order, [len(order) - len(order) // 2, len(order) // 2], tile)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True)), "bits by order"


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("n_tokens", "top_k"), [(2, 1), (7, 2), (41, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_equal_torchs_whatever_the_order_of_experts(geometry, n_tokens, top_k, dtype):
    from adapmoe_lab.engine.host_driven.grouped import tile_for

    layer = Layer(geometry, n_tokens, top_k, dtype)
    check(layer, tile_for(n_tokens, top_k, layer.n_experts))


@pytest.mark.parametrize("number", range(3))
def test_every_tile_gives_the_same_products(number):
    from adapmoe_lab.engine.host_driven.grouped import TILES

    check(Layer((3, 136, 72), 70, 2, torch.bfloat16), TILES[number])
