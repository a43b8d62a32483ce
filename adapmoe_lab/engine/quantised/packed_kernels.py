"""Triton kernels that multiply and unpack a packed matrix; imported only where there is Triton.

The layout of the bytes is that of `code_layout`, the arithmetic that of `PackedMatrix`. A part that
a precision lacks reaches the kernels as None. Axes in the docstrings: B blocks of each of R rows, T
tokens, G weights of a group, P places in a unit, as many as a block has groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from adapmoe_lab.engine.quantised.code_layout import zero_grid

if TYPE_CHECKING:
    from adapmoe_lab.engine.quantised.packed import PackedMatrix

TENSOR_CORE_COLUMNS = 8
"""The fewest columns that a tensor core multiplies a matrix by."""

BFLOAT16_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""How many bfloat16 numbers add up to one of another type, exactly."""

TILES = ((64, 2), (32, 4), (32, 8), (16, 8))
"""Rows and blocks that a program takes at once; the first for the most rows."""

WIDE_TILE = (16, 4)
"""The same where a product has more columns: their sums take the registers of more rows."""

ENOUGH_WARPS = 800
"""Warps that keep the memory of an H100 busy."""

UNPACKED_ROWS = 16
"""Rows of a block that a program unpacks."""


def packed_matmul(matrix: PackedMatrix, x: torch.Tensor) -> torch.Tensor:
    """Return x [n, input], below 2**63 in size, times the transposed weights: [n, output].

    Tensor cores multiply the codes themselves by x, both of which bfloat16 holds exactly, and sum
    in float32; scales and zeros meet the sums of whole groups. The product is in x's dtype.
    """
    n_tokens, (n_rows, n_columns) = x.shape[0], matrix.shape
    product = torch.empty((n_tokens, n_rows), dtype=x.dtype, device=x.device)
    block_groups = matrix.precision.block_groups
    tokens = max(triton.next_power_of_2(n_tokens), TENSOR_CORE_COLUMNS // block_groups)
    rows, blocks = _tile(n_rows, tokens * block_groups)
    codes, high_codes, scales, zeros = _arrays(matrix)
    with torch.cuda.device_of(x):
        _matmul[(triton.cdiv(n_rows, rows),)](
            codes.view(torch.int32),
            high_codes if high_codes is None else high_codes.view(torch.int16),
            scales,
            zeros,
            x.contiguous(),
            product,
            n_tokens,
            n_rows,
            n_columns,
            rows_at_once=rows,
            blocks_at_once=blocks,
            tokens_at_once=tokens,
            x_parts=BFLOAT16_PARTS[x.dtype],
            num_warps=blocks,
            num_stages=3,
            **_constants(matrix),
        )
    return product


def dequantise(matrix: PackedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights [output, input], to the last bit as the CPU computes them."""
    n_rows, n_columns = matrix.shape
    weights = torch.empty(matrix.shape, dtype=dtype, device=matrix.data.device)
    constants = _constants(matrix)
    n_blocks = triton.cdiv(n_columns, constants["block_groups"] * constants["group_size"])
    with torch.cuda.device_of(weights):
        _dequantise[(triton.cdiv(n_rows, UNPACKED_ROWS), n_blocks)](
            *_arrays(matrix),
            weights,
            n_rows,
            n_columns,
            rows_at_once=UNPACKED_ROWS,
            **constants,
        )
    return weights


def _tile(n_rows: int, n_columns: int) -> tuple[int, int]:
    """Return the rows, and the blocks of each, that a program takes at once: a warp to a block.

    The more rows, the fewer loads of x; but enough warps come first. The fastest tried on an H100.

    Args:
        n_rows: rows of the matrix.
        n_columns: columns of the product, one for every token and place.
    """
    if n_columns > TENSOR_CORE_COLUMNS:
        return WIDE_TILE
    busy = (tile for tile in TILES if triton.cdiv(n_rows, tile[0]) * tile[1] >= ENOUGH_WARPS)
    return next(busy, TILES[-1])


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
        "block_groups": precision.block_groups,
        "per_code": per_code,
        "per_zero": per_zero,
    }


# Long: a kernel keeps what it loads in registers, and Triton compiles it as one function.
@triton.jit(do_not_specialize=["n_tokens"])
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
    rows_at_once: tl.constexpr,
    blocks_at_once: tl.constexpr,
    tokens_at_once: tl.constexpr,
    x_parts: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    block_groups: tl.constexpr,
    per_code: tl.constexpr,
    per_zero: tl.constexpr,
):
    """Multiply R rows by all tokens. Codes come in pairs of units, since a word holds two."""
    row = (tl.program_id(0) * rows_at_once + tl.arange(0, rows_at_once))[None, :, None]
    first_blocks = tl.arange(0, blocks_at_once)[:, None, None]
    pair = tl.arange(0, group_size // 2)[None, None, :]
    unit = tl.arange(0, group_size)[None, :, None]
    column = tl.arange(0, tokens_at_once * block_groups)[None, None, :]
    token, place = column // block_groups, column % block_groups
    n_groups = tl.cdiv(n_columns, group_size)
    n_blocks = tl.cdiv(n_groups, block_groups)
    shape: tl.constexpr = (blocks_at_once, rows_at_once, tokens_at_once, block_groups)
    total = tl.zeros(shape, tl.float32)
    scale, zero = _per_group(scales, zeros, row, first_blocks, n_rows, n_groups, block_groups)
    for start in range(0, n_blocks, blocks_at_once):
        block = start + first_blocks
        at = (row * n_blocks + block) * (group_size // 2) + pair
        is_stored = (row < n_rows) & (block < n_blocks)
        low = tl.load(codes + at, mask=is_stored, other=0)
        high = None
        if bits == 3:
            high = _spread(tl.load(high_codes + at, mask=is_stored, other=0))
        # Asked for an iteration ahead: nothing else hides how long these small loads take.
        next_scale, next_zero = _per_group(
            scales, zeros, row, block + blocks_at_once, n_rows, n_groups, block_groups
        )
        inputs = (block * block_groups + place) * group_size + unit
        is_input = (token < n_tokens) & (inputs < n_columns)
        values = tl.load(x + token * n_columns + inputs, mask=is_input, other=0)  # [B, G, T * P]
        sums, x_sums = _sums(low, high, values, place, x_parts, bits, block_groups, zeros is None)
        if zeros is None:
            scale = _power_of_two(scale)
            sums = sums.reshape(shape)
        else:
            scale = scale.to(tl.float32)
            zero = zero.to(tl.float32) * (per_zero / per_code)
            sums = sums.reshape(shape) - zero[:, :, None, :] * x_sums.reshape(shape)
        total += sums * scale[:, :, None, :]
        scale, zero = next_scale, next_zero
    rows = tl.program_id(0) * rows_at_once + tl.arange(0, rows_at_once)[:, None]
    tokens = tl.arange(0, tokens_at_once)[None, :]
    result = tl.sum(tl.sum(total, axis=3), axis=0).to(product.dtype.element_ty)
    tl.store(product + tokens * n_rows + rows, result, mask=(rows < n_rows) & (tokens < n_tokens))


@triton.jit
def _per_group(scales, zeros, row, block, n_rows, n_groups, block_groups: tl.constexpr):
    """Return the scales and zeros [B, R, P] of rows [1, R, 1] and blocks [B, 1, 1]."""
    group = block * block_groups + tl.arange(0, block_groups)[None, None, :]
    is_stored = (row < n_rows) & (group < n_groups)
    scale = tl.load(scales + group * n_rows + row, mask=is_stored, other=0)
    zero = scale
    if zeros is not None:
        zero = tl.load(zeros + group * n_rows + row, mask=is_stored, other=0)
    return scale, zero


@triton.jit
def _sums(
    low,
    high,
    values,
    place_of_column,
    x_parts: tl.constexpr,
    bits: tl.constexpr,
    block_groups: tl.constexpr,
    is_e2m1: tl.constexpr,
):
    """Return the sums of x * code and of x [B, R, T * P]: a token's over the group at a place.

    Low and high hold the lower 16 bits of units and those above, two units to a word [B, R, G / 2].
    Values are x [B, G, T * P], and place_of_column says which place's codes a column of them meets.
    """
    shape: tl.constexpr = (low.shape[0], low.shape[1], values.shape[2])
    sums = tl.zeros(shape, tl.float32)
    x_sums = tl.zeros(shape, tl.float32)
    ones = _halves(tl.full(low.shape, 0x1F801F80, tl.int32))  # 2**-64 undoes the scale of x
    for part in tl.static_range(x_parts):
        rounded = values.to(tl.bfloat16)
        scaled = rounded * 2.0**64  # no product with a code's tiny number is too small
        x_sums = tl.dot(ones, scaled, x_sums)
        for place in tl.static_range(block_groups):
            # Every column is multiplied, whatever its place; only those of this place are kept.
            is_kept = place_of_column == place
            if is_e2m1:
                products = tl.dot(_halves(_e2m1_fields(low, place)), scaled)
                sums += tl.where(is_kept, 2.0**62, 0.0) * products
            else:
                products = tl.dot(_halves(_fields(low, high, place, bits)), scaled)
                sums += tl.where(is_kept, 2.0 ** (69 - place % (8 // bits) * bits), 0.0) * products
        if part + 1 < x_parts:
            values = values.to(tl.float32) - rounded.to(tl.float32)
    return sums, x_sums


@triton.jit
def _halves(words):
    """Return the halves of words [B, R, n] as bfloat16 numbers [B, R, 2 n].

    A half below 2**8 has no exponent but the smallest: it reads as that many times 2**-133.
    """
    low = words.to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high).reshape(words.shape[0], words.shape[1], 2 * words.shape[2])


@triton.jit
def _fields(low, high, place: tl.constexpr, bits: tl.constexpr):
    """Return the codes at a place of both units of a pair, each in the low byte of its half.

    There it begins at bit `place % (8 // bits) * bits`: neighbours share a shift.
    """
    per_shift: tl.constexpr = 8 // bits
    shift: tl.constexpr = place // per_shift * per_shift * bits
    mask: tl.constexpr = ((1 << bits) - 1) * 0x10001 << place % per_shift * bits
    if bits == 3 and shift == 12:
        window = low >> 12 & 0xF000F | high << 4
    elif bits == 3 and shift == 18:
        window = high >> 2
    else:
        window = low >> shift
    return window & mask


@triton.jit
def _e2m1_fields(low, place: tl.constexpr):
    """Return the codes at a place as bfloat16 numbers in both halves, 2**-126 of what they mean.

    Exponent and mantissa of a code, moved to the bottom of bfloat16's exponent, read as that.
    """
    shift: tl.constexpr = 4 * place - 6
    moved = low << -shift if shift < 0 else low >> shift
    return moved & 0x1C001C0 | low << 12 - 4 * place & -0x7FFF8000


@triton.jit
def _spread(pairs):
    """Return the two bytes of int16 items in the halves of int32 words."""
    words = pairs.to(tl.int32)
    return words & 0xFF | (words & 0xFF00) << 8


@triton.jit
def _dequantise(
    codes,
    high_codes,
    scales,
    zeros,
    weights,
    n_rows,
    n_columns,
    rows_at_once: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    block_groups: tl.constexpr,
    per_code: tl.constexpr,
    per_zero: tl.constexpr,
):
    """Unpack a block of rows_at_once rows, in the arithmetic of `PackedMatrix.dequantise`."""
    row = (tl.program_id(0) * rows_at_once + tl.arange(0, rows_at_once))[:, None, None]
    block = tl.program_id(1)
    place = tl.arange(0, block_groups)[None, :, None]
    unit = tl.arange(0, group_size)[None, None, :]
    n_groups = tl.cdiv(n_columns, group_size)
    at_unit = (row * tl.cdiv(n_groups, block_groups) + block) * group_size + unit
    units = tl.load(codes + at_unit, mask=row < n_rows, other=0).to(tl.int32)
    if bits == 3:
        high = tl.load(high_codes + at_unit, mask=row < n_rows, other=0).to(tl.int32)
        units = units & 0xFFFF | high << 16
    code = units >> place * bits & ((1 << bits) - 1)
    group = block * block_groups + place
    at_group = group * n_rows + row
    is_group = (row < n_rows) & (group < n_groups)
    scale = tl.load(scales + at_group, mask=is_group, other=0)
    if zeros is None:
        number = ((code & 7) << 22 | (code & 8) << 28).to(tl.float32, bitcast=True) * 2.0**126
        weight = number * _power_of_two(scale)
    else:
        zero = tl.load(zeros + at_group, mask=is_group, other=0).to(tl.int32)
        level = (code * per_code - zero * per_zero).to(tl.float32)
        weight = level * (scale.to(tl.float32) * (1 / per_code))
    column = group * group_size + unit
    at_weight = row.to(tl.int64) * n_columns + column
    is_weight = (row < n_rows) & (column < n_columns)
    tl.store(weights + at_weight, weight.to(weights.dtype.element_ty), mask=is_weight)


@triton.jit
def _power_of_two(scale):
    """Return 2**(scale - 127) of E8M0 scales uint8, as float32."""
    bits = tl.where(scale == 0, 0x400000, scale.to(tl.int32) << 23)
    return bits.to(tl.float32, bitcast=True)
