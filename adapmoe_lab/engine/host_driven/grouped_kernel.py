"""The kernel that multiplies many tokens with many experts at once; imported where there is Triton.

Axes in the docstrings: N rows, one for every expert that a token runs, sorted by expert; a tile is
some rows of one expert.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows_at", "first_tile", "first_row"])
def grouped_product_kernel(
    table, rows_at, first_tile, first_row, offset, x, weights, out, n_rows, n_columns, top_k,
    is_weighted: tl.constexpr, tokens_at_once: tl.constexpr,
    rows_at_once: tl.constexpr, columns_at_once: tl.constexpr,
):  # fmt: skip
    """Multiply the rows of each tile with the transposed matrix [R, C] of its expert.

    Programs of one part of a matrix follow each other, so that it is read from memory once. Sums
    are float32. Which rows share a tile changes no bit of a product.

    Args:
        table: int64; of every tile the expert's address, its first row, and the expert's last row
            and one; from `rows_at` on, of every row the place t * K + k where it was chosen.
        rows_at: numbers in the table before the rows.
        first_tile: tile of the first program.
        first_row: row of the first program, with which `out` begins; if `is_weighted`, `x` does.
        offset: numbers before the matrix in an expert's buffer, a multiple of 16 bytes.
        x: [T, C], in the precision of the experts; if `is_weighted`, [n, C], of rows.
        weights: [T, K], what products are multiplied with, once they are rounded, if `is_weighted`.
        out: [n, R], of rows; if `is_weighted`, [T, K, R] in the precision of sums.
        n_rows: R.
        n_columns: C.
        top_k: K.
        is_weighted: whether this is the last product of an expert.
        tokens_at_once: rows of a tile.
        rows_at_once: rows of a matrix that a program takes.
        columns_at_once: columns at once.
    """
    tile = table + 3 * (first_tile + tl.program_id(0))
    rows = tl.load(tile + 1) + tl.arange(0, tokens_at_once)
    is_row = rows < tl.load(tile + 2)
    places = tl.load(table + rows_at + rows, mask=is_row, other=0)
    if is_weighted:
        sources, targets = rows - first_row, places
    else:
        sources, targets = places // top_k, rows - first_row
    kind: tl.constexpr = x.dtype.element_ty
    # the hint must come last: nothing is known of a sum with the offset, nor of a cast
    address = tl.load(tile)
    matrix = tl.multiple_of(address.to(tl.pointer_type(kind)) + offset, 16)
    outputs = tl.program_id(1) * rows_at_once + tl.arange(0, rows_at_once)
    is_output = outputs < n_rows
    total = tl.zeros([tokens_at_once, rows_at_once], tl.float32)
    for begin in range(0, n_columns, columns_at_once):
        inner = begin + tl.arange(0, columns_at_once)
        is_inner = inner < n_columns
        vectors = tl.load(
            x + sources[:, None] * n_columns + inner[None, :],
            mask=is_row[:, None] & is_inner[None, :], other=0.0,
        )  # fmt: skip
        part = tl.load(
            matrix + outputs[None, :] * n_columns + inner[:, None],
            mask=is_output[None, :] & is_inner[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(vectors, part, total)
    product = total.to(kind)
    if is_weighted:
        weight = tl.load(weights + places, mask=is_row, other=0.0).to(tl.float32)
        product = product.to(tl.float32) * weight[:, None]
    tl.store(
        out + targets[:, None] * n_rows + outputs[None, :], product.to(out.dtype.element_ty),
        mask=is_row[:, None] & is_output[None, :],
    )  # fmt: skip
