"""From floating-point weights to packed ones, and from the packed forms checkpoints come in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch.nn import functional

from adapmoe_lab.engine.quantised.code_layout import E2M1, pack, row_blocks, zero_grid
from adapmoe_lab.engine.quantised.packed import PackedMatrix
from adapmoe_lab.records.precision import PRECISIONS, Precision

MXFP4 = PRECISIONS["mxfp4"]
SMALLEST_SCALE = 2.0**-24
"""The smallest float16 above zero."""

MAX_ITERATIONS = 20
LEAST_GAIN = 1e-3
"""The fit of a block of rows ends when an iteration lowers its squared error by less than this."""

Groups = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes uint8 [R, n_groups, G], scales float16 and zeros uint8 [R, n_groups, 1]."""


def quantise(
    weight: torch.Tensor,
    precision: Precision,
    out: torch.Tensor | None = None,
    solver: str = "hqq",
) -> PackedMatrix:
    """Store the weights [output, input] in a packed precision.

    Rows are taken in blocks: on the host temporaries stay far below 64 MiB whatever the matrix.

    Args:
        weight: floating-point weights [output, input], finite.
        precision: an integer precision, or mxfp4, which has one solver only and ignores the name.
        out: uint8 [matrix_bytes] to write into, in place of fresh bytes on the weight's device.
        solver: `hqq` fits zero and scale of every group to its weights; `nearest` rounds between
            minimum and maximum.

    Raises:
        ValueError: the arguments do not fit each other, or a weight is not finite or too large.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}.")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight must be floating-point [output, input]; got {weight.dtype} "
            f"{list(weight.shape)}. Give one expert's matrix at a time."
        )
    matrix = _empty(precision, (weight.shape[0], weight.shape[1]), weight.device, out)
    for rows in row_blocks(matrix.shape, matrix.data.device):
        block = weight[rows].float()
        _check_finite(block, rows.start)
        groups = _grouped(block, precision.group_size)
        if precision.name == "mxfp4":
            codes, scales = _nearest_e2m1(groups)
            _store(matrix, rows, codes, scales=scales)
        else:
            codes, scales, zeros = SOLVERS[solver](groups, precision.bits)
            _store(matrix, rows, codes, scales=scales, zeros=zeros)
    return matrix


def pack_mxfp4(
    blocks: torch.Tensor, scales: torch.Tensor, columns: int, out: torch.Tensor | None = None
) -> PackedMatrix:
    """Repack one mxfp4 matrix of a gpt-oss checkpoint without touching a number.

    Args:
        blocks: uint8 [output, n_groups, 16]; byte j holds inputs 2j (low nibble) and 2j + 1.
        scales: uint8 [output, n_groups], E8M0.
        columns: inputs of the matrix, at most 32 * n_groups.
        out: uint8 [matrix_bytes] to write into, in place of fresh bytes.
    """
    n_groups = -(-columns // 32)
    expected = (scales.shape[0], n_groups)
    if blocks.shape != (*expected, 16) or scales.shape != expected:
        raise ValueError(
            f"{columns} inputs make blocks [output, {n_groups}, 16] and scales [output, "
            f"{n_groups}]; got {list(blocks.shape)} and {list(scales.shape)}. "
            f"Give the tensors of one expert's matrix as the checkpoint stores them."
        )
    matrix = _empty(MXFP4, (blocks.shape[0], columns), blocks.device, out)
    for rows in row_blocks(matrix.shape, matrix.data.device):
        codes = torch.stack([blocks[rows] & 0xF, blocks[rows] >> 4], dim=-1).flatten(-2)
        _store(matrix, rows, codes, scales=scales[rows, :, None])
    return matrix


def _nearest(groups: torch.Tensor, bits: int) -> Groups:
    """Round to nearest between each group's minimum and maximum: at most half a step of error.

    The range always includes zero weight, for padding and because a zero is stored within it. The
    scale is rounded up, so that both ends stay in reach.
    """
    largest = (1 << bits) - 1
    lowest = groups.amin(-1, keepdim=True).clamp_(max=0)
    highest = groups.amax(-1, keepdim=True).clamp_(min=0)
    exact = (highest - lowest) / largest
    half_ulp = (exact * 2.0**-11).clamp_(min=SMALLEST_SCALE / 2)
    scales = (exact + half_ulp).clamp_(min=SMALLEST_SCALE).half()
    if scales.isinf().any():
        raise ValueError(
            f"A group of weights spans {(highest - lowest).max():.4g}, but int{bits} reaches no "
            f"further than {largest} times the largest float16, 65504. Scale the weights down."
        )
    zeros = _stored_zeros(-lowest / scales.float(), bits)
    codes = _codes(groups / scales.float(), _in_codes(zeros, bits), bits)
    return codes.to(torch.uint8), scales, zeros.to(torch.uint8)


def _half_quadratic(groups: torch.Tensor, bits: int) -> Groups:
    """Fit each group's zero and scale to its codes, round anew, and again, while the error falls.

    The alternation of HQQ (Badri and Shaji, 2023, https://mobiusml.github.io/hqq_blog, equations 4
    to 8) with two departures, each for a smaller error. Its shrinkage is left out: with the
    published p = 0.7 and beta = 10 it is zero for every error below 0.17, far above those of
    weights. And the scale is fitted after the zero, where HQQ keeps the first one.

    Every iterate is judged as it would be stored, its zero in 8 bits and its scale in float16, and
    each group keeps its best, so that none ends with more squared error than rounded to nearest.
    """
    _, first_scales, first_zeros = _nearest(groups, bits)
    scales, zeros = first_scales.float(), first_zeros.float()
    best_scales, best_zeros, best_error = scales, zeros, torch.full_like(scales, float("inf"))
    previous = float("inf")
    for _ in range(MAX_ITERATIONS):
        inputs, zero = groups / scales, _in_codes(zeros, bits)
        codes = _codes(inputs, zero, bits)
        error = (codes - zero - inputs).mul_(scales).square_().sum(-1, keepdim=True)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scales = torch.where(is_better, scales, best_scales)
        best_zeros = torch.where(is_better, zeros, best_zeros)
        total = best_error.sum().item()
        if total >= previous * (1 - LEAST_GAIN):
            break
        previous = total
        zeros = _stored_zeros((codes - inputs).mean(-1, keepdim=True), bits)
        levels = codes - _in_codes(zeros, bits)
        size = levels.square().sum(-1, keepdim=True).clamp_(min=SMALLEST_SCALE)
        fitted = levels.mul_(groups).sum(-1, keepdim=True) / size
        scales = torch.where(fitted > SMALLEST_SCALE, fitted, scales).half().float()
    codes = _codes(groups / best_scales, _in_codes(best_zeros, bits), bits)
    return codes.to(torch.uint8), best_scales.half(), best_zeros.to(torch.uint8)


SOLVERS: Mapping[str, Callable[[torch.Tensor, int], Groups]] = MappingProxyType(
    {"hqq": _half_quadratic, "nearest": _nearest}
)


def _codes(inputs: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the nearest codes, as floats, of weights divided by their scale."""
    return (inputs + zero).round_().clamp_(0, (1 << bits) - 1)


def _stored_zeros(zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Return zeros given in codes as they are stored, floats of 0 to 255."""
    return (zero * (255 / ((1 << bits) - 1))).round_().clamp_(0, 255)


def _in_codes(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Return stored zeros, floats of 0 to 255, in codes."""
    per_code, per_zero = zero_grid(bits)
    return zeros * (per_zero / per_code)


def _nearest_e2m1(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest E2M1 codes uint8 [R, n_groups, 32] and E8M0 scales uint8 [R, n_groups, 1].

    The scale gives the largest weight of a group the largest exponent of E2M1, which is 2 (OCP
    Microscaling Formats v1.0, section 6.3); what lies beyond 6 becomes 6.
    """
    _, exponents = groups.abs().amax(-1, keepdim=True).frexp()  # the largest is in 2**[e - 1, e)
    shifts = (exponents - 3).clamp_(-127, 127)
    magnitudes = torch.tensor(E2M1[:8], device=groups.device)
    midpoints = (magnitudes[1:] + magnitudes[:-1]) / 2
    codes = torch.bucketize(torch.ldexp(groups.abs(), -shifts), midpoints).to(torch.uint8)
    return codes | (groups.signbit().to(torch.uint8) << 3), (shifts + 127).to(torch.uint8)


def _empty(
    precision: Precision, shape: tuple[int, int], device: torch.device, out: torch.Tensor | None
) -> PackedMatrix:
    """Return a matrix of zero bytes, padding included, in `out` where given."""
    if out is None:
        n_bytes = precision.matrix_bytes(*shape)
        out = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    matrix = PackedMatrix(precision, shape, out)
    matrix.data.zero_()
    return matrix


def _store(
    matrix: PackedMatrix, rows: slice, codes: torch.Tensor, **per_group: torch.Tensor
) -> None:
    """Write the codes [R, n_groups, G] and per-group arrays [R, n_groups, 1] of some rows."""
    for name, plane in pack(codes, matrix.precision).items():
        matrix.part(name)[rows] = plane
    for name, values in per_group.items():
        matrix.part(name)[:, rows] = values.squeeze(-1).T


def _grouped(block: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return rows [R, input] as groups [R, n_groups, G], the last one padded with zeros."""
    padding = -block.shape[1] % group_size
    return functional.pad(block, (0, padding)).unflatten(1, (-1, group_size))


def _check_finite(block: torch.Tensor, first_row: int) -> None:
    if block.isfinite().all():
        return
    row, column = (~block.isfinite()).nonzero()[0].tolist()
    raise ValueError(
        f"Every weight must be finite; weight[{first_row + row}, {column}] is "
        f"{block[row, column].item()}. The checkpoint is damaged: fetch it again."
    )
