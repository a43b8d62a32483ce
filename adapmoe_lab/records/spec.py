"""What a Mixture-of-Experts model is, as far as offloading is concerned."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records.files import RecordError, digest, fields_of
from adapmoe_lab.records.precision_plan import NOT_KNOWN, PrecisionPlan


def max_skipped_fraction(top_k: int) -> float:
    """Return the most that can be skipped of a top-K routing, one expert always being kept."""
    return (top_k - 1) / top_k


def experts_run(top_k: int, skipped_fraction: float) -> float:
    """Return how many of K experts are run per token and layer where a fraction is skipped."""
    return (1 - skipped_fraction) * top_k


class PartialIdentityWarning(UserWarning):
    """A saved file knows only a part of the weights it was made for."""


@dataclass(frozen=True)
class MoESpec:
    """Shape and identity of a Mixture-of-Experts model.

    Attributes:
        model_id: name or folder the model was loaded from.
        revision: identity of the weights; the same weights give the same text anywhere.
        family: the transformers model type, such as `mixtral`.
        n_layers: L, layers with routed experts.
        n_experts: E, routed experts per layer.
        top_k: K, experts the router chooses per token.
        hidden_size: D, width of an expert's input and output.
        expert_bytes: stored bytes of one expert by precision, the widest layer's.
        precision: the precision and bytes that every expert is stored in.
        layer_paths: module path of each layer's experts, in layer order.
        normalises_router: whether the router's K weights sum to one.
        partial_revision: identity by a part of the weights, as versions up to 0.1 took it; empty
            where it is not known.
    """

    model_id: str
    revision: str
    family: str
    n_layers: int
    n_experts: int
    top_k: int
    hidden_size: int
    expert_bytes: Mapping[str, int]
    precision: PrecisionPlan
    layer_paths: tuple[str, ...] = field(default=())
    normalises_router: bool = True
    partial_revision: str = ""

    def __post_init__(self) -> None:
        """Check that the counts make sense together."""
        object.__setattr__(self, "expert_bytes", MappingProxyType(dict(self.expert_bytes)))
        object.__setattr__(self, "layer_paths", tuple(self.layer_paths))
        if min(self.n_layers, self.n_experts, self.top_k, self.hidden_size) < 1:
            raise RecordError("A MoESpec needs at least one layer, expert, choice and channel.")
        if self.top_k > self.n_experts:
            raise RecordError(f"top_k={self.top_k} exceeds the {self.n_experts} experts per layer.")
        wanted, sizes = (self.n_layers, self.n_experts), self.precision.expert_bytes
        if sizes is None or sizes.shape != wanted:
            raise RecordError(
                f"The precision of a model of {wanted[0]} layers x {wanted[1]} experts gives the "
                f"bytes of each, got {'none' if sizes is None else list(sizes.shape)}."
            )

    @property
    def dtype(self) -> str:
        """What the experts are stored in, in words; compare `precision` instead."""
        return str(self.precision)

    @property
    def stored_bytes(self) -> NDArray[np.int64]:
        """Stored bytes of every expert, int64 [L, E]."""
        sizes = self.precision.expert_bytes
        assert sizes is not None, "checked on construction"  # noqa: S101
        return sizes

    @property
    def slot_bytes(self) -> NDArray[np.int64]:
        """Bytes of a slot that any expert of the layer fits into, int64 [L]."""
        return self.stored_bytes.max(axis=1)

    @property
    def stored_expert_bytes(self) -> int:
        """Bytes of the widest expert as it is stored; of any, if all are stored alike."""
        return int(self.stored_bytes.max())

    @property
    def mean_expert_bytes(self) -> float:
        """Stored bytes of an expert, averaged over all."""
        return self.all_experts_bytes / (self.n_layers * self.n_experts)

    @property
    def all_experts_bytes(self) -> int:
        """Stored bytes of every expert of the model."""
        return int(self.stored_bytes.sum())

    @property
    def max_skipped_fraction(self) -> float:
        """The most that can be skipped, one expert of every layer always being kept."""
        return max_skipped_fraction(self.top_k)

    def experts_run(self, skipped_fraction: float) -> float:
        """Return the experts run per token and layer where a fraction of them is skipped."""
        return experts_run(self.top_k, skipped_fraction)

    def sizes_in(self, precision: PrecisionPlan | None) -> PrecisionPlan:
        """Return a plan with its bytes, for this model; the model's own where it is not known.

        A known plan without bytes, as configs of version 0.1 hold it, gets those of
        `expert_bytes`.
        """
        if precision is None or precision.names is None:
            return self.precision
        if precision.expert_bytes is not None:
            return precision
        sizes = [[self.expert_bytes[name] for name in layer] for layer in precision.names]
        return PrecisionPlan(precision.names, np.array(sizes))

    def fingerprint(self) -> str:
        """Identify the weights and their shape, wherever they lie and in whatever precision."""
        return self._identified_by(self.revision)

    def partial_fingerprint(self) -> str | None:
        """Identify the model as versions up to 0.1 did, by a part of its weights."""
        return self._identified_by(self.partial_revision) if self.partial_revision else None

    def check_made_for(self, fingerprint: str, made: str, remedy: str) -> None:
        """Refuse what was made for other weights than this model's.

        What versions up to 0.1 made knows a part of the weights only; it is taken with a warning
        where that part is the same.

        Args:
            fingerprint: of the model that it was made for.
            made: what it is and for which model, as the beginning of a sentence.
            remedy: what to do if it is another model, as a sentence.

        Raises:
            RecordError: it was made for other weights.
        """
        if fingerprint == self.fingerprint():
            return
        if fingerprint != self.partial_fingerprint():
            raise RecordError(
                f"{made}, fingerprint {fingerprint}; {self.model_id!r} ({self.family}, "
                f"{self.n_layers} layers x {self.n_experts} experts) has fingerprint "
                f"{self.fingerprint()}. {remedy}"
            )
        warnings.warn(
            f"{made} by a version that told models apart by a part of their weights. That part is "
            f"the same in {self.model_id!r}; whether its experts are is not known. Make it anew to "
            "be sure.",
            PartialIdentityWarning,
            stacklevel=4,
        )

    def _identified_by(self, revision: str) -> str:
        shape = (self.family, self.n_layers, self.n_experts, self.top_k, self.hidden_size)
        return digest(json.dumps(shape), revision)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that `from_json` reads back."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["expert_bytes"] = dict(self.expert_bytes)
        values["precision"] = self.precision.to_json()
        values["layer_paths"] = list(self.layer_paths)
        return values

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], source: str = "The model's description"
    ) -> MoESpec:
        """Build a spec from what `to_json` returned, today's or that of version 0.1.

        Raises:
            RecordError: a value is unknown, missing or wrong; the text names `source`.
        """
        if isinstance(values, Mapping) and "dtype" in values:
            values = _with_precision(values)
        found = fields_of(cls, values, source, later=("partial_revision",))
        shape = found["n_layers"], found["n_experts"]
        precision = PrecisionPlan.from_json(shape, found["precision"], f"{source}, precision,")
        return cls(**{**found, "precision": precision})


def _with_precision(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a spec of version 0.1, which only named the precision, as today's."""
    fields = dict(values)
    dtype, sizes = fields.pop("dtype"), dict(fields.get("expert_bytes", {}))
    fields["precision"] = {"experts": dtype, "bytes": sizes.get(dtype)}
    sizes.pop(NOT_KNOWN, None)
    return {**fields, "expert_bytes": sizes}
