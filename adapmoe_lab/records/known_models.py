"""Dimensions of published models, by which fit is judged before anything is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapmoe_lab.records.listed import read_listed
from adapmoe_lab.records.precision import ITEM_BYTES
from adapmoe_lab.records.precision_plan import PrecisionPlan
from adapmoe_lab.records.spec import MoESpec

PRECISION = "bfloat16"


@dataclass(frozen=True)
class KnownModel:
    """A published model whose experts are three matrices each.

    Attributes:
        name: what it is called.
        n_layers: L, layers with routed experts.
        n_experts: E, routed experts per layer.
        top_k: K, experts the router chooses per token.
        hidden_size: D, width of an expert's input and output.
        expert_width: width between an expert's matrices.
        total_parameters: of the whole model, as its authors count them.
    """

    name: str
    n_layers: int
    n_experts: int
    top_k: int
    hidden_size: int
    expert_width: int
    total_parameters: float

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in bfloat16."""
        return 3 * self.hidden_size * self.expert_width * ITEM_BYTES[PRECISION]

    @property
    def other_bytes(self) -> int:
        """Bytes of everything but the experts, in bfloat16."""
        return int(self.total_parameters * ITEM_BYTES[PRECISION]) - self.spec.all_experts_bytes

    @property
    def spec(self) -> MoESpec:
        """The model with all experts in bfloat16; its weights are not identified."""
        shape = self.n_layers, self.n_experts
        return MoESpec(
            model_id=self.name,
            revision="",
            family="",
            n_layers=self.n_layers,
            n_experts=self.n_experts,
            top_k=self.top_k,
            hidden_size=self.hidden_size,
            expert_bytes={PRECISION: self.expert_bytes},
            precision=PrecisionPlan.uniform(PRECISION, shape, self.expert_bytes),
        )


def load_known_models(path: Path) -> list[KnownModel]:
    """Return the models of a file.

    Raises:
        RecordError: the file is not a list of models, or a value is unknown or missing.
    """
    return read_listed(path, KnownModel, "models", "known models")
