"""The precisions experts are stored in, and where a matrix's parts lie in its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

ALIGNMENT = 16
"""Every part of a stored matrix starts at a multiple of this many bytes, for wide loads."""

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int16": 2, "uint8": 1}


@dataclass(frozen=True)
class Part:
    """A contiguous array inside the bytes of a stored matrix.

    Attributes:
        name: `values` of a plain matrix; `codes`, `high_codes`, `scales`, `zeros` of a packed one.
        dtype: torch and numpy name of the element type.
        shape: axes of the array: output channels first, but groups of inputs first in `scales` and
            `zeros`, so that those of neighbouring rows are read together.
        offset: bytes from the start of the matrix.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the array, padding excluded."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Precision:
    """How the weights of an expert's matrix [output, input] are stored.

    Packed precisions cut every row into groups of `group_size` inputs, the last one padded with
    zero weights. An integer precision stores `weight = (code - zero) * scale` with one scale and
    one zero per group; `mxfp4` stores the E2M1 numbers and E8M0 scales of the OCP microscaling
    format, without zeros. The codes of `block_groups` groups side by side share units of 16 bits,
    or of 24 where codes have three; a row is padded to whole blocks of groups.

    Attributes:
        name: what users call it.
        bits: bits per weight, scales excluded.
        group_size: inputs that share a scale; None for plain floating point.
    """

    name: str
    bits: int
    group_size: int | None = None

    @property
    def is_packed(self) -> bool:
        """Whether weights are codes with scales rather than floating-point numbers."""
        return self.group_size is not None

    @property
    def block_groups(self) -> int:
        """Groups that share units, each with one code in every unit."""
        return 8 if self.bits == 3 else 16 // self.bits

    def parts(self, n_rows: int, n_columns: int) -> tuple[Part, ...]:
        """Return where the arrays of a matrix [n_rows, n_columns] lie."""
        if self.group_size is None:
            return (Part("values", self.name, (n_rows, n_columns), 0),)
        n_groups = -(-n_columns // self.group_size)
        n_units = -(-n_groups // self.block_groups) * self.group_size
        arrays = [("codes", "int16", (n_rows, n_units))]
        if self.bits == 3:
            arrays.append(("high_codes", "uint8", (n_rows, n_units)))
        if self.name == "mxfp4":
            arrays.append(("scales", "uint8", (n_groups, n_rows)))
        else:
            arrays.append(("scales", "float16", (n_groups, n_rows)))
            arrays.append(("zeros", "uint8", (n_groups, n_rows)))
        parts, offset = [], 0
        for name, dtype, shape in arrays:
            part = Part(name, dtype, shape, offset)
            parts.append(part)
            offset = aligned(offset + part.n_bytes)
        return tuple(parts)

    def matrix_bytes(self, n_rows: int, n_columns: int) -> int:
        """Return the bytes of a stored matrix, rounded up to the alignment."""
        last = self.parts(n_rows, n_columns)[-1]
        return aligned(last.offset + last.n_bytes)


def aligned(n_bytes: int, to: int = ALIGNMENT) -> int:
    """Round a size or offset up to a multiple of the alignment."""
    return -(-n_bytes // to) * to


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        precision.name: precision
        for precision in (
            Precision("float32", 32),
            Precision("bfloat16", 16),
            Precision("float16", 16),
            Precision("int8", 8, group_size=64),
            Precision("int4", 4, group_size=32),
            Precision("int3", 3, group_size=32),
            Precision("int2", 2, group_size=32),
            Precision("mxfp4", 4, group_size=32),
        )
    }
)

SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def precision_named(name: str) -> Precision:
    """Return the precision of a name, short forms such as `bf16` included.

    Raises:
        ValueError: there is no such precision; the text lists those there are.
    """
    full = SHORT_NAMES.get(name, name)
    if full not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise ValueError(
            f"{name!r} is not a precision experts can be stored in; give one of {known}."
        )
    return PRECISIONS[full]
