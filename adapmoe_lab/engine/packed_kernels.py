"""Triton kernels that multiply and unpack a packed matrix; imported only where there is Triton.

The layout of the bytes is that of `code_layout`, the arithmetic that of `PackedMatrix`. A part that
a precision lacks reaches the kernels as None.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adapmoe_lab.engine.packed import PackedMatrix, zero_grid

CHUNK_BYTES = 16
"""Bytes of a row that a thread takes at once; fewer where a group has fewer."""

UNPACKED_GROUPS = 64
"""Groups of a row that a program unpacks."""


def packed_matmul(matrix: PackedMatrix, x: torch.Tensor) -> torch.Tensor:
    """Return x [n, input] times the transposed weights, [n, output] in x's dtype, for a few tokens.

    A program multiplies a few rows by one token and sums in float32. The programs of the same rows
    run side by side, so that their bytes leave device memory once for all tokens.
    """
    n_tokens, (n_rows, n_columns) = x.shape[0], matrix.shape
    product = torch.empty((n_tokens, n_rows), dtype=x.dtype, device=x.device)
    constants = _constants(matrix)
    per_group = max(1, constants["group_size"] * matrix.precision.bits // 8 // CHUNK_BYTES)
    n_chunks = triton.cdiv(n_columns, constants["group_size"]) * per_group
    rows, max_chunks, n_warps = _tile(matrix)
    with torch.cuda.device_of(x):
        _matmul[(n_tokens * triton.cdiv(n_rows, rows),)](
            *_arrays(matrix),
            x.contiguous(),
            product,
            n_tokens,
            n_rows,
            n_columns,
            per_group=per_group,
            rows_at_once=rows,
            chunks_at_once=min(max_chunks, triton.next_power_of_2(n_chunks)),
            num_warps=n_warps,
            enable_fp_fusion=True,
            **constants,
        )
    return product


def dequantise(matrix: PackedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights [output, input], to the last bit as the CPU computes them."""
    n_rows, n_columns = matrix.shape
    weights = torch.empty(matrix.shape, dtype=dtype, device=matrix.data.device)
    constants = _constants(matrix)
    n_blocks = triton.cdiv(n_columns, UNPACKED_GROUPS * constants["group_size"])
    with torch.cuda.device_of(weights):
        _dequantise[(n_rows, n_blocks)](
            *_arrays(matrix),
            weights,
            n_columns,
            groups_at_once=UNPACKED_GROUPS,
            enable_fp_fusion=True,
            **constants,
        )
    return weights


def _tile(matrix: PackedMatrix) -> tuple[int, int, int]:
    """Return the rows and chunks of a row that a program takes at once, and its warps.

    Rows share their loads of x, as far as registers reach; few rows are spread over more programs.
    The fastest of those tried on an H100.
    """
    return (4, 64, 2) if matrix.shape[0] >= 4096 else (2, 128, 4)


def _arrays(matrix: PackedMatrix) -> list[torch.Tensor | None]:
    """Return every part a precision may have, or None, in the order the kernels take them."""
    present = {part.name for part in matrix.precision.parts(*matrix.shape)}
    names = ("codes", "high_codes", "scales", "zeros")
    return [matrix.part(name) if name in present else None for name in names]


def _constants(matrix: PackedMatrix) -> dict[str, int]:
    """Return what the kernels are compiled for."""
    precision = matrix.precision
    per_code, per_zero = zero_grid(precision.bits)
    return {
        "bits": precision.bits,
        "group_size": precision.group_size,
        "per_code": per_code,
        "per_zero": per_zero,
    }


@triton.jit
def _matmul(
    codes,
    high_codes,
    scales,
    zeros,
    x,
    product,
    n_tokens,
    n_rows,
    n_columns,
    per_group: tl.constexpr,
    rows_at_once: tl.constexpr,
    chunks_at_once: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    per_code: tl.constexpr,
    per_zero: tl.constexpr,
):
    """Multiply rows_at_once rows by one token; a chunk is what a thread takes of a row's group."""
    token = (tl.program_id(0) % n_tokens).to(tl.int64)
    rows = (tl.program_id(0) // n_tokens).to(tl.int64) * rows_at_once + tl.arange(0, rows_at_once)
    n_groups = tl.cdiv(n_columns, group_size)
    x += token * n_columns
    total = tl.zeros([rows_at_once, chunks_at_once], tl.float32)
    for first in range(0, n_groups * per_group, chunks_at_once):
        chunks = first + tl.arange(0, chunks_at_once)
        groups = chunks // per_group
        is_inside = (rows < n_rows)[:, None] & (groups < n_groups)[None, :]
        at = rows[:, None] * n_groups + groups[None, :]
        scale = tl.load(scales + at, mask=is_inside, other=0)
        if zeros is None:
            sums = _e2m1_sums(
                codes, x, rows, chunks, is_inside, n_groups, n_columns, group_size, per_group
            )
            total += sums * _power_of_two(scale)
        else:
            low_bits: tl.constexpr = 2 if bits == 3 else bits
            sums, x_sums = _field_sums(
                codes,
                x,
                rows,
                chunks,
                is_inside,
                n_groups,
                n_columns,
                low_bits,
                group_size,
                per_group,
            )
            if bits == 3:
                high_sums, _ = _field_sums(
                    high_codes,
                    x,
                    rows,
                    chunks,
                    is_inside,
                    n_groups,
                    n_columns,
                    1,
                    group_size,
                    per_group,
                )
                sums += 4 * high_sums
            zero = tl.load(zeros + at, mask=is_inside, other=0).to(tl.float32)
            sums -= zero * (per_zero / per_code) * x_sums[None, :]
            total += sums * scale.to(tl.float32)
    sums = tl.sum(total, axis=1).to(product.dtype.element_ty)
    tl.store(product + token * n_rows + rows, sums, mask=rows < n_rows)


@triton.jit
def _field_sums(
    codes,
    x,
    rows,
    chunks,
    is_inside,
    n_groups,
    n_columns,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    per_group: tl.constexpr,
):
    """Return the sums of x * field [rows, chunks] and of x [chunks].

    A field becomes a float by two bit operations and no conversion: moved to the top of the
    mantissa of 1.0 it reads 1 + field / 2**k. With x scaled by 2**k, the sum of x * field is what
    remains after the sum of the scaled x, which is common to all rows.
    """
    group_bytes: tl.constexpr = group_size * bits // 8
    chunk: tl.constexpr = group_bytes // per_group
    width: tl.constexpr = 4 if bits < 4 else bits  # bits that share a shift
    inside = tl.arange(0, chunk)
    at = rows[:, None, None] * (n_groups * group_bytes) + chunks[None, :, None] * chunk
    packed = tl.load(codes + at + inside[None, None, :], mask=is_inside[:, :, None], other=0)
    packed = packed.to(tl.int32)
    first_columns = chunks // per_group * group_size + chunks % per_group * chunk
    sums = tl.zeros(packed.shape, tl.float32)
    x_sums = tl.zeros(chunks.shape, tl.float32)
    ones_sums = tl.zeros(chunks.shape, tl.float32)
    for place in tl.static_range(8 // bits):
        one = 1 << (width - place * bits % width)  # what 1.0 counts, in steps of the field
        columns = first_columns[:, None] + (place * group_bytes + inside)[None, :]
        values = tl.load(x + columns, mask=columns < n_columns, other=0).to(tl.float32)
        x_sum = tl.sum(values, axis=1)
        x_sums += x_sum
        ones_sums += x_sum * one
        numbers = _one_plus_field(packed, place, bits, width)
        sums = tl.fma(tl.broadcast_to((values * one)[None, :, :], packed.shape), numbers, sums)
    return tl.sum(sums, axis=2) - ones_sums[None, :], x_sums


@triton.jit
def _one_plus_field(packed, place: tl.constexpr, bits: tl.constexpr, width: tl.constexpr):
    """Return 1 + a byte's field / 2**k, k the bits from the field's lowest to its run's highest."""
    shift: tl.constexpr = 23 - width - place * bits // width * width
    mask: tl.constexpr = ((1 << bits) - 1) << (23 - width + place * bits % width)
    return ((packed << shift) & mask | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _e2m1_sums(
    codes,
    x,
    rows,
    chunks,
    is_inside,
    n_groups,
    n_columns,
    group_size: tl.constexpr,
    per_group: tl.constexpr,
):
    """Return the sums of x * number [rows, chunks] of E2M1 codes.

    Exponent and mantissa of a code, moved to the bottom of float32's exponent, read as the number
    times 2**-126, whether normal or not; x is scaled up so that no product is too small.
    """
    group_bytes: tl.constexpr = group_size // 2
    chunk: tl.constexpr = group_bytes // per_group
    inside = tl.arange(0, chunk)
    at = rows[:, None, None] * (n_groups * group_bytes) + chunks[None, :, None] * chunk
    packed = tl.load(codes + at + inside[None, None, :], mask=is_inside[:, :, None], other=0)
    packed = packed.to(tl.int8, bitcast=True).to(tl.int32)
    first_columns = chunks // per_group * group_size + chunks % per_group * chunk
    sums = tl.zeros(packed.shape, tl.float32)
    for place in tl.static_range(2):
        columns = first_columns[:, None] + (place * group_bytes + inside)[None, :]
        values = tl.load(x + columns, mask=columns < n_columns, other=0).to(tl.float32) * 2.0**64
        # The sign repeats above bit 7 of the high nibble; the low one is moved up to make it so.
        signed = packed << 18 if place == 1 else packed << 28 >> 6
        numbers = (signed & -0x7E400000).to(tl.float32, bitcast=True)
        sums = tl.fma(tl.broadcast_to(values[None, :, :], packed.shape), numbers, sums)
    return tl.sum(sums, axis=2) * 2.0**62


@triton.jit
def _dequantise(
    codes,
    high_codes,
    scales,
    zeros,
    weights,
    n_columns,
    groups_at_once: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    per_code: tl.constexpr,
    per_zero: tl.constexpr,
):
    """Unpack groups_at_once groups of one row, in the arithmetic of `PackedMatrix.dequantise`."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * groups_at_once + tl.arange(0, groups_at_once)
    inputs = tl.arange(0, group_size)
    columns = groups[:, None] * group_size + inputs[None, :]
    is_inside = columns < n_columns
    at = (row * tl.cdiv(n_columns, group_size) + groups)[:, None]
    is_group = (groups * group_size < n_columns)[:, None]
    scale = tl.load(scales + at, mask=is_group, other=0)
    if zeros is None:
        code = _fields(codes, at, inputs, is_inside, bits, group_size)
        number = ((code & 7) << 22 | (code & 8) << 28).to(tl.float32, bitcast=True) * 2.0**126
        weight = number * _power_of_two(scale)
    else:
        code = _fields(codes, at, inputs, is_inside, 2 if bits == 3 else bits, group_size)
        if bits == 3:
            code |= _fields(high_codes, at, inputs, is_inside, 1, group_size) << 2
        zero = tl.load(zeros + at, mask=is_group, other=0).to(tl.int32)
        level = (code * per_code - zero * per_zero).to(tl.float32)
        weight = level * (scale.to(tl.float32) * (1 / per_code))
    tl.store(weights + row * n_columns + columns, weight.to(weights.dtype.element_ty), is_inside)


@triton.jit
def _fields(codes, at, inputs, is_inside, bits: tl.constexpr, group_size: tl.constexpr):
    """Return the fields int32 [groups, inputs] of the groups that lie `at` [groups, 1]."""
    group_bytes: tl.constexpr = group_size * bits // 8
    places = (inputs % group_bytes)[None, :]
    packed = tl.load(codes + at * group_bytes + places, mask=is_inside, other=0).to(tl.int32)
    return packed >> (inputs // group_bytes * bits)[None, :] & ((1 << bits) - 1)


@triton.jit
def _power_of_two(scale):
    """Return 2**(scale - 127) of E8M0 scales uint8, as float32."""
    bits = tl.where(scale == 0, 0x400000, scale.to(tl.int32) << 23)
    return bits.to(tl.float32, bitcast=True)
