"""The kernel of a captured step that multiplies with experts wherever they lie.

Everything runs on one stream, in order: a slot is written by the programs of one expert, and read
no earlier than in a later step.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["offset", "x_stride"])
def served_product_kernel(
    reads, writes, columns, offset, x, x_stride, out, n_rows, n_columns,
    rows_at_once: tl.constexpr, columns_at_once: tl.constexpr,
):  # fmt: skip
    """Multiply a matrix [N, D] of each expert with its vector, wherever the expert lies.

    What is read of an expert that was given a slot is written through to it. Sums are float32.

    Args:
        reads: as `step_kernel` fills it; so `writes` and `columns`.
        writes: see there.
        columns: see there; where an expert's vector and product go.
        offset: numbers before the matrix in an expert's buffer, a multiple of 16 bytes.
        x: vector of column k at k * x_stride, in the precision of the experts.
        x_stride: 0 where all experts share one vector.
        out: [K, N], the same.
        n_rows: rows of the matrix.
        n_columns: columns of the matrix.
        rows_at_once: rows of a program.
        columns_at_once: columns at once.
    """
    rank = tl.program_id(1)
    address = tl.load(reads + rank)
    if address != 0:
        target = tl.load(writes + rank)
        column = tl.load(columns + rank)
        kind: tl.constexpr = x.dtype.element_ty
        # the hint must come last: nothing is known of a sum with the offset, nor of a cast
        weights = tl.multiple_of(address.to(tl.pointer_type(kind)) + offset, 16)
        copies = tl.multiple_of(target.to(tl.pointer_type(kind)) + offset, 16)
        rows = tl.program_id(0) * rows_at_once + tl.arange(0, rows_at_once)
        total = tl.zeros([rows_at_once, columns_at_once], tl.float32)
        for begin in range(0, n_columns, columns_at_once):
            inner = begin + tl.arange(0, columns_at_once)
            is_there = (rows < n_rows)[:, None] & (inner < n_columns)[None, :]
            places = rows[:, None] * n_columns + inner[None, :]
            vector = tl.load(x + column * x_stride + inner, mask=inner < n_columns, other=0.0)
            part = tl.load(weights + places, mask=is_there, other=0.0)
            total += part.to(tl.float32) * vector.to(tl.float32)[None, :]
            if target != 0:
                tl.store(copies + places, part, mask=is_there)
        tl.store(out + column * n_rows + rows, tl.sum(total, 1).to(kind), mask=rows < n_rows)
