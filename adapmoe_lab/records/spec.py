"""What a Mixture-of-Experts model is, as far as offloading is concerned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from adapmoe_lab.records.files import RecordError, digest, fields_of


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
        expert_bytes: stored bytes of one expert by precision.
        dtype: the precision the experts are stored in.
        layer_paths: module path of each layer's experts, in layer order.
        normalises_router: whether the router's K weights sum to one.
    """

    model_id: str
    revision: str
    family: str
    n_layers: int
    n_experts: int
    top_k: int
    hidden_size: int
    expert_bytes: Mapping[str, int]
    dtype: str
    layer_paths: tuple[str, ...] = field(default=())
    normalises_router: bool = True

    def __post_init__(self) -> None:
        """Check that the counts make sense together."""
        object.__setattr__(self, "expert_bytes", MappingProxyType(dict(self.expert_bytes)))
        object.__setattr__(self, "layer_paths", tuple(self.layer_paths))
        if min(self.n_layers, self.n_experts, self.top_k, self.hidden_size) < 1:
            raise RecordError("A MoESpec needs at least one layer, expert, choice and channel.")
        if self.top_k > self.n_experts:
            raise RecordError(f"top_k={self.top_k} exceeds the {self.n_experts} experts per layer.")
        if self.dtype not in self.expert_bytes:
            known = ", ".join(self.expert_bytes)
            raise RecordError(f"expert_bytes has no entry for dtype {self.dtype!r}, only: {known}.")

    @property
    def stored_expert_bytes(self) -> int:
        """Bytes of one expert in the precision it is stored in."""
        return self.expert_bytes[self.dtype]

    @property
    def all_experts_bytes(self) -> int:
        """Stored bytes of every expert of the model."""
        return self.n_layers * self.n_experts * self.stored_expert_bytes

    def fingerprint(self) -> str:
        """Identify the weights and their shape, wherever they lie and in whatever precision."""
        shape = (self.family, self.n_layers, self.n_experts, self.top_k, self.hidden_size)
        return digest(json.dumps(shape), self.revision)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that `from_json` reads back."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["expert_bytes"] = dict(self.expert_bytes)
        values["layer_paths"] = list(self.layer_paths)
        return values

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], source: str = "The model's description"
    ) -> MoESpec:
        """Build a spec from what `to_json` returned.

        Raises:
            RecordError: a value is unknown, missing or wrong; the text names `source`.
        """
        return cls(**fields_of(cls, values, source))
