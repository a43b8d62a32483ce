"""Experts of many tokens in groups, without a GPU: tables, kernels, and that they compile."""

from __future__ import annotations

import re

import numpy as np
import pytest
from interpreted import assert_compiles, check_interpreted

from adapmoe_lab.engine.host_driven.grouped import TILES, group_table, tile_for
from adapmoe_lab.engine.host_driven.layer_step import in_groups


@pytest.mark.parametrize("seed", range(8))
def test_every_row_is_in_one_tile_of_its_expert(seed):
    rng = np.random.default_rng(seed)
    n_tokens, top_k, n_experts = rng.integers(1, 40), rng.integers(1, 5), rng.integers(5, 12)
    drawn = rng.random((n_tokens, n_experts)).argsort(axis=1)[:, :top_k]
    indices = np.where(rng.random(drawn.shape) < 0.1, n_experts, drawn)
    keep = (indices < n_experts) & (rng.random(drawn.shape) < 0.8)
    experts = rng.permutation(np.unique(indices[keep])).tolist()
    addresses = [1000 + expert for expert in experts]
    table = group_table(indices, keep, experts, addresses, 4)
    tiles, rows = table.numbers[: table.rows_at].reshape(-1, 3), table.numbers[table.rows_at :]
    found = []
    for rank, expert in enumerate(experts):
        first, end = table.first_tiles[rank : rank + 2]
        for address, begin, last in tiles[first:end].tolist():
            assert address == 1000 + expert
            assert begin < last == table.first_rows[rank + 1]
            found += [(expert, int(row)) for row in rows[begin : min(begin + 4, last)]]
    assert table.first_tiles[-1] == len(tiles)
    flat = indices.ravel()
    expected = [(e, int(p)) for e in experts for p in np.flatnonzero((flat == e) & keep.ravel())]
    assert found == expected


def test_nothing_to_run_makes_an_empty_table():
    table = group_table(np.full((3, 2), 8), np.zeros((3, 2), dtype=bool), [], [], 16)
    assert table.numbers.size == table.rows_at == 0
    assert table.first_rows.tolist() == table.first_tiles.tolist() == [0]


def test_groups_keep_the_order_and_none_is_empty():
    assert in_groups([5, 3, 9, 1, 2], 2) == [[5, 3], [9, 1, 2]]
    assert in_groups([5], 2) == [[5]]
    assert in_groups([], 2) == []
    assert in_groups([5, 3], 2) == [[5], [3]]


def test_tiles_grow_with_the_tokens_of_an_expert():
    assert [tile_for(n, 8, 64).tokens for n in (2, 32, 128, 200, 512, 9999)] == [
        16, 16, 16, 32, 64, 64,
    ]  # fmt: skip


def test_in_tritons_interpreter_the_kernel_passes_its_tests():
    pytest.importorskip("triton", reason="triton, which runs on Linux only, is not installed")
    check_interpreted("tests/gpu/test_grouped_products.py", "--noconftest")


@pytest.mark.slow
def test_in_tritons_interpreter_prompts_pass_their_tests():
    pytest.importorskip("triton", reason="triton, which runs on Linux only, is not installed")
    check_interpreted("tests/gpu/test_prefill.py")


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: str(tile.tokens))
def test_the_kernel_compiles_for_a_gpu(tile, is_weighted, tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="triton, which runs on Linux only, is not installed")
    from adapmoe_lab.engine.host_driven.grouped_kernel import grouped_product_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    numbers = ("rows_at", "first_tile", "first_row", "offset", "n_rows", "n_columns", "top_k")
    types = {**dict.fromkeys(numbers, "i32"), "table": "*i64"}
    types |= {"x": "*bf16", "weights": "*fp32", "out": "*fp32" if is_weighted else "*bf16"}
    constants = {
        "is_weighted": is_weighted, "tokens_at_once": tile.tokens, "rows_at_once": tile.rows,
        "columns_at_once": tile.columns,
    }  # fmt: skip
    aligned = ("x", "out", "weights", "n_rows", "n_columns")
    compiled = assert_compiles(
        grouped_product_kernel, types, constants, tile.n_warps, aligned, num_stages=tile.n_stages
    )
    assert compiled.metadata.shared <= 99 * 1024, "what a consumer's GPU has"
    loads = re.findall(r"cp\.async\.c[ag]\S*|ld\.global\S*", compiled.asm["ptx"])
    assert loads.count("cp.async.cg.shared.global") > 8, "16 bytes at once, ahead of their use"
    assert len(loads) < 2 * loads.count("cp.async.cg.shared.global")
