"""Which precision every expert is stored in, and how many bytes that takes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.records.arguments import described
from adapmoe_lab.records.expert_format import ExpertFormat
from adapmoe_lab.records.files import RecordError, digest, frozen_array, known_values
from adapmoe_lab.records.precision import precision_named

NOT_KNOWN = "mixed"
"""What files of version 0.1 call every layout of several precisions, without saying which."""


@dataclass(frozen=True, eq=False)
class PrecisionPlan:
    """How L layers of E experts are stored: the precision and the bytes of each expert.

    Two plans are equal if they are known and agree in every expert; a layout that a file of
    version 0.1 calls `mixed` is not known, and equal to none but itself.

    Attributes:
        names: precision of each expert, [L][E]; None if that is not known.
        expert_bytes: int64 [L, E], stored bytes of each expert; None in configs of version 0.1.
            Where only the layout is not known, the widest expert's for all.
    """

    names: tuple[tuple[str, ...], ...] | None
    expert_bytes: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        """Freeze names and bytes, and check that they fit each other."""
        if self.names is not None:
            if isinstance(self.names, str):
                raise RecordError(
                    f"A precision plan names a precision per expert, [L][E], got {self.names!r}; "
                    "PrecisionPlan.uniform gives all experts one."
                )
            names = _precisions(self.names)
            object.__setattr__(self, "names", names)
            if len({len(layer) for layer in names}) != 1 or not names[0]:
                raise RecordError(
                    "A precision plan names as many experts in every layer, at least one; got "
                    f"{[len(layer) for layer in names]}."
                )
        if self.expert_bytes is not None:
            shape = (None, None) if self.names is None else (len(self.names), len(self.names[0]))
            given = _whole_numbers(self.expert_bytes)
            sizes = frozen_array("expert_bytes", given, np.int64, shape)
            if not sizes.size or sizes.min() < 1:
                raise RecordError("Every expert of a precision plan takes at least one byte.")
            object.__setattr__(self, "expert_bytes", sizes)

    @classmethod
    def of(cls, formats: Sequence[Sequence[ExpertFormat]]) -> PrecisionPlan:
        """Return the plan of experts laid out in the given formats [L][E]."""
        return cls(
            tuple(tuple(layout.precision for layout in layer) for layer in formats),
            np.array([[layout.n_bytes for layout in layer] for layer in formats]),
        )

    @classmethod
    def uniform(
        cls, name: str, shape: tuple[int, int], n_bytes: ArrayLike | None = None
    ) -> PrecisionPlan:
        """Return a plan that stores all experts of a model in one precision.

        Args:
            name: the precision.
            shape: L and E.
            n_bytes: stored bytes of an expert, anything that broadcasts to [L, E].
        """
        sizes = None if n_bytes is None else np.broadcast_to(np.asarray(n_bytes), shape)
        return cls(((name,) * shape[1],) * shape[0], sizes)

    @property
    def shape(self) -> tuple[int, int] | None:
        """L and E; None if neither layout nor bytes are known."""
        if self.names is not None:
            return len(self.names), len(self.names[0])
        return None if self.expert_bytes is None else self.expert_bytes.shape

    @property
    def n_bytes(self) -> int | None:
        """Stored bytes of all experts."""
        return None if self.expert_bytes is None else int(self.expert_bytes.sum())

    @property
    def counts(self) -> Mapping[str, int]:
        """Experts by precision, the most frequent first; empty if the layout is not known."""
        counted = Counter(name for layer in self.names or () for name in layer)
        return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))

    @property
    def name(self) -> str | None:
        """The precision of all experts; None if they differ, or the layout is not known."""
        return next(iter(self.counts)) if self.is_uniform else None

    @property
    def is_uniform(self) -> bool:
        """Whether all experts are stored in one precision."""
        return len(self.counts) == 1

    def __eq__(self, other: object) -> bool:
        """Whether both plans are known and store every expert alike, in as many bytes."""
        if self is other:
            return True
        if not isinstance(other, PrecisionPlan) or self.names is None or self.names != other.names:
            return False
        return np.array_equal(_known(self.expert_bytes), _known(other.expert_bytes))

    def __hash__(self) -> int:
        """Hash the layout; bytes nearly always follow from it."""
        return hash(self.names)

    def __str__(self) -> str:
        """Name the precisions, with counts if there are several: `6 x int4, 2 x float32`."""
        if self.names is None:
            return "several precisions, not known which"
        return self.name or ", ".join(f"{n} x {name}" for name, n in self.counts.items())

    def n_unlike(self, other: PrecisionPlan) -> int:
        """Return how many experts two known plans of one model store in unlike precisions."""
        if self.names is None or other.names is None or self.shape != other.shape:
            raise RecordError(f"Two layouts of one model can be compared, got {self} and {other}.")
        return int((np.array(self.names) != np.array(other.names)).sum())

    def fingerprint(self) -> str:
        """Identify the precision and the bytes of every expert."""
        sizes = b"" if self.expert_bytes is None else self.expert_bytes.tobytes()
        return digest(json.dumps(self.names), sizes)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that `from_json` reads back.

        What is the same in all experts, or in all of a layer, is written once.
        """
        values: dict[str, Any] = {"experts": NOT_KNOWN}
        if self.names is not None:
            values["experts"] = _compact([list(layer) for layer in self.names])
        if self.expert_bytes is not None:
            values["bytes"] = _compact(self.expert_bytes.tolist())
        return values

    @classmethod
    def from_json(
        cls, shape: tuple[int, int], values: Mapping[str, Any], source: str = "The precision plan"
    ) -> PrecisionPlan:
        """Build the plan of a model of L layers of E experts from what `to_json` returned.

        Raises:
            RecordError: a value is unknown, missing or wrong; the text names `source`.
        """
        found = known_values(values, source, ("experts", "bytes"), later=("bytes",))
        names, sizes = found["experts"], found.get("bytes")
        of_each = None if names == NOT_KNOWN else _spread(names, *shape, source)
        bytes_of_each = None if sizes is None else _spread(sizes, *shape, source)
        try:
            return cls(of_each, None if bytes_of_each is None else _whole_numbers(bytes_of_each))
        except RecordError as error:
            raise RecordError(f"{source} cannot be used: {error}") from error


def _precisions(names: Any) -> tuple[tuple[str, ...], ...]:
    """Return the full names of precisions [L][E]."""
    try:
        return tuple(tuple(precision_named(name).name for name in layer) for layer in names)
    except TypeError as error:
        raise RecordError(
            f"A precision plan names a precision per expert, [L][E], got {described(names)}."
        ) from error
    except ValueError as error:
        raise RecordError(str(error)) from error


def _whole_numbers(sizes: Any) -> NDArray[Any]:
    """Return bytes as an array; what numpy would cut to whole numbers is refused."""
    try:
        array = np.asarray(sizes)
    except ValueError:  # rows of several lengths
        array = np.empty(0, dtype=object)
    if not np.issubdtype(array.dtype, np.integer):
        raise RecordError(
            "The bytes of a precision plan must be whole numbers, one per expert, [L][E], got "
            f"{described(sizes)}."
        )
    return array


def _known(sizes: NDArray[np.int64] | None) -> NDArray[np.int64]:
    return np.zeros(0, dtype=np.int64) if sizes is None else sizes


def _compact(table: list[list[Any]]) -> Any:
    """Return a table with equal rows as one value each, and equal values as one."""
    rows = [row[0] if len(set(row)) == 1 else row for row in table]
    return rows[0] if all(row == rows[0] for row in rows[1:]) and not _is_row(rows[0]) else rows


def _spread(value: Any, n_layers: int, n_experts: int, source: str) -> tuple[tuple[Any, ...], ...]:
    """Return the table [L][E] that `_compact` made smaller."""
    rows = value if _is_row(value) else [value] * n_layers
    table = tuple(tuple(row) if _is_row(row) else (row,) * n_experts for row in rows)
    if [len(row) for row in table] != [n_experts] * n_layers:
        raise RecordError(
            f"{source} needs an entry per expert, {n_layers} layers of {n_experts}; got "
            f"{[len(row) for row in table]}."
        )
    return table


def _is_row(value: Any) -> bool:
    return isinstance(value, list)
