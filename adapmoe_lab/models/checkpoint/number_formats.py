"""The number formats that checkpoints come in, block-scaled and microscaled ones included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

FP8 = "F8_E4M3"
FP8_SCALE = "_scale_inv"
MXFP4_PARTS = ("_blocks", "_scales")

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    FP8: torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, eq=False)
class Mxfp4Matrix:
    """A matrix as a microscaling checkpoint holds it.

    Attributes:
        blocks: uint8 [output, groups, 16], two E2M1 codes a byte, the earlier one in the low half.
        scales: uint8 [output, groups], E8M0.
    """

    blocks: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input channels, the last group's padding included."""
        return self.blocks.shape[0], 2 * self.blocks.shape[1] * self.blocks.shape[2]


ExpertTensors = Mapping[str, torch.Tensor | Mxfp4Matrix]


def dequantise_fp8(
    weight: torch.Tensor, scale: torch.Tensor, blocks: tuple[int, int] | None = None
) -> torch.Tensor:
    """Return a scaled float8 matrix [output, input] in float32.

    Args:
        weight: the matrix.
        scale: one number for the matrix, of any shape; or [blocks of output, blocks of input],
            one for each block of rows and columns.
        blocks: rows and columns of a block, as the configuration has them; None to go by the
            shapes, which fit blocks of a power of two, such as DeepSeek-V3's of 128 x 128.

    Raises:
        ValueError: the scales fit the matrix in no such way.
    """
    if scale.numel() == 1:
        return weight.float() * scale.float().reshape(())
    if scale.dim() != weight.dim():
        raise ValueError(f"scales {list(scale.shape)} do not fit a matrix {list(weight.shape)}")
    for axis, given in zip((-2, -1), blocks or (None, None), strict=True):
        width = _block_width(weight.shape[axis], scale.shape[axis], given)
        scale = scale.repeat_interleave(width, dim=axis)
    return weight.float() * scale[..., : weight.shape[-2], : weight.shape[-1]].float()


def _block_width(n_channels: int, n_blocks: int, given: int | None) -> int:
    """Return the block width that cuts the channels into that many blocks."""
    widths = [1 << power for power in range((n_channels - 1).bit_length(), -1, -1)]
    for width in ([given] if given is not None else []) + widths:
        if -(-n_channels // width) == n_blocks:
            return width
    raise ValueError(f"{n_blocks} scales do not divide {n_channels} channels into equal blocks")
