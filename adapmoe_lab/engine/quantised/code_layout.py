"""How codes lie in the bytes of a row, so that a kernel unpacks those of one group together."""

from __future__ import annotations

from math import gcd

import torch
from torch.nn import functional

from adapmoe_lab.records.precision import Precision

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The number each 4-bit code of the OCP microscaling format v1.0 (table 5) stands for."""


def pack(codes: torch.Tensor, precision: Precision) -> dict[str, torch.Tensor]:
    """Pack codes uint8 [R, n_groups, G] into the units of every row, by part name.

    Unit j of a block holds the j-th code of each of its groups, the first group in its lowest bits.
    Its lower 16 bits are `codes` int16 [R, n_units]; three-bit codes reach eight bits further, and
    those are `high_codes` uint8 [R, n_units].
    """
    padding = -codes.shape[1] % precision.block_groups
    groups = functional.pad(codes, (0, 0, 0, padding)).to(_unit_dtype(precision))
    first, *others = groups.unflatten(1, (-1, precision.block_groups)).unbind(2)
    units = first.clone()  # [R, n_blocks, G]
    for place, run in enumerate(others, start=1):
        units |= run << (place * precision.bits)
    planes = {"codes": units.to(torch.int16).flatten(1)}
    if precision.bits == 3:
        planes["high_codes"] = (units >> 16).to(torch.uint8).flatten(1)
    return planes


def unpack(planes: dict[str, torch.Tensor], precision: Precision) -> torch.Tensor:
    """Return the codes uint8 [R, n_groups, G] of units by part name, padding groups included."""
    units = planes["codes"].to(_unit_dtype(precision))
    if precision.bits == 3:
        units = units & 0xFFFF | planes["high_codes"].int() << 16
    blocks = units.unflatten(1, (-1, precision.group_size))
    mask = (1 << precision.bits) - 1
    places = range(0, precision.block_groups * precision.bits, precision.bits)
    return torch.stack([(blocks >> low & mask).to(torch.uint8) for low in places], 2).flatten(1, 2)


def _unit_dtype(precision: Precision) -> torch.dtype:
    return torch.int32 if precision.bits == 3 else torch.int16


CPU_BLOCK_ITEMS = 1 << 18
"""Float32 temporaries of so many items stay within a cache."""

CUDA_BLOCK_ITEMS = 1 << 23
"""So many items keep a device busy, and their temporaries take some hundred MiB."""


def row_blocks(shape: tuple[int, int], device: torch.device) -> list[slice]:
    """Cut the rows of a matrix [rows, columns] into slices to be worked on one after the other."""
    n_rows, n_columns = shape
    block_items = CUDA_BLOCK_ITEMS if device.type == "cuda" else CPU_BLOCK_ITEMS
    step = max(1, block_items // max(1, n_columns))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def zero_grid(bits: int) -> tuple[int, int]:
    """Return how many grid steps a code and a step of a stored zero are.

    A stored zero is a fraction of the code range, `zeros / 255 * (2**bits - 1)` codes. On the grid
    both share, `code * per_code - zeros * per_zero` is an exact integer; times `scale / per_code`,
    it is the weight, rounded the same on every device whether or not it fuses multiply and add.
    """
    largest = (1 << bits) - 1
    shared = gcd(255, largest)
    return 255 // shared, largest // shared
