"""A matrix in its packed form: bytes in host memory or in a slot, multiplied as they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional

from adapmoe_lab.engine.device import runs_kernels
from adapmoe_lab.engine.quantised.code_layout import E2M1, row_blocks, unpack, zero_grid
from adapmoe_lab.records.precision import ALIGNMENT, Part, Precision

KERNEL_TOKENS = 8
"""Up to so many tokens a kernel multiplies packed codes; beyond, unpacking once costs less."""

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What a kernel multiplies packed codes by."""


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix [output, input] as codes with scales, in one flat run of bytes.

    Nothing is copied: every part is a view of `data`, which may itself be a view into a slot.

    Attributes:
        precision: how the weights are stored.
        shape: output and input channels.
        data: uint8 [matrix_bytes], on any device, contiguous, at a multiple of ALIGNMENT.
    """

    precision: Precision
    shape: tuple[int, int]
    data: torch.Tensor

    def __post_init__(self) -> None:
        if not self.precision.is_packed:
            raise ValueError(
                f"A packed matrix needs a precision with codes, such as int4; "
                f"{self.precision.name} has none. Keep its weights in a plain tensor."
            )
        expected = self.precision.matrix_bytes(*self.shape)
        data = self.data
        if data.dtype != torch.uint8 or data.shape != (expected,) or not data.is_contiguous():
            raise ValueError(
                f"{self.shape[0]} x {self.shape[1]} weights in {self.precision.name} need a "
                f"contiguous uint8 [{expected}]; got {_described(data)}. "
                f"Allocate precision.matrix_bytes(*shape) bytes."
            )
        if data.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"A packed matrix is read in wide loads and needs an address that is a multiple of "
                f"{ALIGNMENT}; got data {data.data_ptr() % ALIGNMENT} bytes past one. Begin its "
                f"slot at a multiple of precision.ALIGNMENT bytes."
            )

    def part(self, name: str) -> torch.Tensor:
        """Return a part's array as a view of the bytes; precision.Part says its axes.

        Raises:
            KeyError: the precision has no such part.
        """
        part = _parts_by_name(self.precision, self.shape)[name]
        chunk = self.data[part.offset : part.offset + part.n_bytes]
        return chunk.view(getattr(torch, part.dtype)).view(part.shape)

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights [output, input]: computed in float32, rounded once to `dtype`."""
        if runs_kernels(self.data.device):
            from adapmoe_lab.engine.quantised import packed_kernels

            return packed_kernels.dequantise(self, dtype)
        weights = self.data.new_empty(self.shape, dtype=dtype)
        for rows in row_blocks(self.shape, self.data.device):
            weights[rows] = self._weights(rows)
        return weights

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [n, input] times the transposed weights: [n, output] in x's dtype.

        On the CPU, and for more than `KERNEL_TOKENS` tokens, the weights are unpacked first; a CUDA
        kernel multiplies fewer tokens by the codes, at a cost that follows the packed bytes.
        """
        if x.dim() != 2 or x.shape[1] != self.shape[1]:
            raise ValueError(
                f"x must be [n, {self.shape[1]}], as many columns as the matrix has inputs; "
                f"got {list(x.shape)}."
            )
        is_traced = torch.is_grad_enabled() and x.requires_grad  # the kernel has no gradient
        suits_kernel = x.dtype in KERNEL_DTYPES and 0 < x.shape[0] <= KERNEL_TOKENS
        if suits_kernel and not is_traced and runs_kernels(self.data.device):
            from adapmoe_lab.engine.quantised import packed_kernels

            return packed_kernels.packed_matmul(self, x)
        return functional.linear(x, self.dequantise(x.dtype))

    def _weights(self, rows: slice) -> torch.Tensor:
        """Return the float32 weights of some rows [R, input]."""
        planes = {
            name: self.part(name)[rows]
            for name in _parts_by_name(self.precision, self.shape)
            if name.endswith("codes")
        }
        scales = self.part("scales").T[rows, :, None]
        codes = unpack(planes, self.precision)[:, : scales.shape[1]]  # [R, n_groups, G]
        if self.precision.name == "mxfp4":
            numbers = torch.tensor(E2M1, device=codes.device)
            weights = numbers.index_select(0, codes.flatten().int()).view(codes.shape)
            exponents = scales.int() - 127
            weights.mul_(torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents))
        else:
            per_code, per_zero = zero_grid(self.precision.bits)
            zeros = self.part("zeros").T[rows, :, None].float() * per_zero
            weights = codes.float().mul_(per_code).sub_(zeros).mul_(scales.float() * (1 / per_code))
        return weights.flatten(1)[:, : self.shape[1]]


@cache
def _parts_by_name(precision: Precision, shape: tuple[int, int]) -> dict[str, Part]:
    return {part.name: part for part in precision.parts(*shape)}


def _described(tensor: torch.Tensor) -> str:
    layout = "contiguous" if tensor.is_contiguous() else "strided"
    return f"a {layout} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
