"""How the codes of a group lie in its bytes, so that a kernel unpacks them with shifts alone."""

from __future__ import annotations

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The number each 4-bit code of the OCP microscaling format v1.0 (table 5) stands for."""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes uint8 [..., G] into bytes uint8 [..., G * bits / 8]; `bits` divides 8.

    A group of G is cut into 8 / bits equal runs; byte j holds the j-th code of every run, the
    first run in its lowest bits.
    """
    first, *others = codes.unflatten(-1, (8 // bits, -1)).unbind(-2)
    packed = first.clone()
    for place, run in enumerate(others, start=1):
        packed |= run << (place * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes uint8 [..., G] that lie in bytes [..., G * bits / 8]; undoes `pack`."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    return torch.cat([(packed >> low) & mask for low in range(0, 8, bits)], dim=-1)


def pack_planes(codes: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """Return the byte arrays of codes uint8 [..., G] by part name; three bits take two of them."""
    if bits == 3:
        return {"codes": pack(codes & 3, 2), "high_codes": pack(codes >> 2, 1)}
    return {"codes": pack(codes, bits)}


def unpack_planes(planes: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """Return the codes uint8 [..., G] of byte arrays by part name; undoes `pack_planes`."""
    if bits == 3:
        return unpack(planes["codes"], 2) | (unpack(planes["high_codes"], 1) << 2)
    return unpack(planes["codes"], bits)


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
