"""Where the tensors of one expert lie in its contiguous bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from adapmoe_lab.records.precision import ITEM_BYTES, PRECISIONS, Precision, aligned


@dataclass(frozen=True)
class Field:
    """One tensor of an expert inside its bytes.

    Attributes:
        name: the parameter's name in the experts module.
        shape: its shape there, the expert axis left out.
        precision: how it is stored.
        transposed: whether `shape` is [input, output]; packed matrices are stored the other way.
        offset: bytes from the start of the expert.
    """

    name: str
    shape: tuple[int, ...]
    precision: Precision
    transposed: bool
    offset: int

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Output and input channels of a matrix."""
        first, second = self.shape
        return (second, first) if self.transposed else (first, second)

    @property
    def n_bytes(self) -> int:
        """Stored bytes, scales included."""
        if self.precision.is_packed:
            return self.precision.matrix_bytes(*self.matrix_shape)
        return prod(self.shape) * ITEM_BYTES[self.precision.name]


@dataclass(frozen=True)
class ExpertFormat:
    """How an expert is laid out: its tensors one after the other, each aligned.

    Attributes:
        precision: name of the precision of the expert's matrices.
        fields: the tensors in the module's order.
    """

    precision: str
    fields: tuple[Field, ...]

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        precision: str,
        dtype: str,
        transposed: bool = False,
    ) -> ExpertFormat:
        """Lay out tensors of the given shapes.

        Args:
            shapes: shape of each tensor of one expert, the expert axis left out.
            precision: how matrices are stored.
            dtype: how everything else, such as biases, is stored.
            transposed: whether matrices are [input, output], as in gpt-oss.
        """
        fields, offset = [], 0
        for name, shape in shapes.items():
            stored = PRECISIONS[precision if len(shape) == 2 else dtype]
            field = Field(name, tuple(shape), stored, transposed, offset)
            fields.append(field)
            offset = aligned(offset + field.n_bytes)
        return cls(precision, tuple(fields))

    @property
    def n_bytes(self) -> int:
        """Bytes of the expert, rounded up to the alignment."""
        last = self.fields[-1]
        return aligned(last.offset + last.n_bytes)
