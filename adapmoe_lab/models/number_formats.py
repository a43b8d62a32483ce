"""The number formats that checkpoints come in, block-scaled and microscaled ones included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

FP8_SCALE = "_scale_inv"
MXFP4_PARTS = ("_blocks", "_scales")

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I8": torch.int8,
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


def dequantise_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return a block-scaled float8 matrix [output, input] in float32.

    `scale` [blocks of output, blocks of input] multiplies square blocks, 128 wide in DeepSeek-V3;
    the width follows from the shapes.
    """
    for axis in (-2, -1):
        block = _block_width(weight.shape[axis], scale.shape[axis])
        scale = scale.repeat_interleave(block, dim=axis)
    return weight.float() * scale[..., : weight.shape[-2], : weight.shape[-1]].float()


def _block_width(n_channels: int, n_blocks: int) -> int:
    """Return the power-of-two block width that cuts the channels into that many blocks."""
    width = 1 << (n_channels - 1).bit_length()
    while -(-n_channels // width) < n_blocks:
        width //= 2
    return width
