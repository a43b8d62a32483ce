"""The numbers AdapMoE's authors published, which reproduce the paper without its models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.assets import data_folder
from adapmoe_lab.records.files import RecordError, frozen_array, known_values

SENSITIVITY_PREFIX = "sensitivity_"
STORED = (
    "source",
    "notes",
    "sensitivity_8x7b",
    "sensitivity_8x22b",
    "mmlu_8x7b",
    "single_expert_ratio_8x7b",
    "prefetch_accuracy_8x7b",
    "allocations",
)
STORED_OF_RUN = ("threshold", "accuracy", "single_ratio", "per_layer", "avg_activated_experts")
STORED_OF_ALLOCATION = ("published_slots", "published_cost", "optimal_cost", "uniform_cost")
GATED_SUFFIX = "adaptive_gating=true"
N_MMLU_QUESTIONS = 14_042
"""Questions of MMLU's test split; every published accuracy is a whole number of them over this."""


@dataclass(frozen=True, eq=False)
class PublishedRun:
    """One MMLU run of Mixtral-8x7B, a top-2 model, under AdapMoE's rule.

    Attributes:
        threshold: T of the rule; 0 is the ungated model.
        accuracy: share of questions answered right.
        single_expert_ratio: float64 [L], share of each layer's tokens run with one expert.
    """

    threshold: float
    accuracy: float
    single_expert_ratio: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Freeze the ratios and check that they and the accuracy are shares."""
        ratio = frozen_array("single_expert_ratio", self.single_expert_ratio, np.float64, (None,))
        object.__setattr__(self, "single_expert_ratio", ratio)
        if not (ratio.min() >= 0 and ratio.max() <= 1 and 0 < self.accuracy < 1):
            raise RecordError(
                f"Ratios and accuracy of the run at T = {self.threshold:g} must be shares."
            )

    @property
    def mean_single_expert_ratio(self) -> float:
        """Share of tokens run with one expert, over all layers: the paper's percentage."""
        return float(self.single_expert_ratio.mean())

    @property
    def skipped_fraction(self) -> float:
        """Share of expert activations skipped: half the single-expert ratio.

        A token run with one expert skips one of its two, so a 25 % single-expert ratio is
        2 -> 1.75 experts per token, 12.5 % fewer activated experts.
        """
        return self.mean_single_expert_ratio / 2

    @property
    def experts_per_token(self) -> float:
        """Experts run per token and layer."""
        return 2 - self.mean_single_expert_ratio

    @property
    def accuracy_se(self) -> float:
        """Standard error of the accuracy over questions.

        Runs answer the same questions, so what separates two of them is known better than this.
        """
        return float(np.sqrt(self.accuracy * (1 - self.accuracy) / N_MMLU_QUESTIONS))


@dataclass(frozen=True, eq=False)
class PublishedAdapMoE:
    """Published sensitivities, MMLU under the rule they drive, and slots (arXiv 2408.10284).

    Attributes:
        source: where the numbers come from.
        sensitivity: float64 [L] by model, S_l of every layer.
        mmlu: runs of Mixtral-8x7B by evaluation, in ascending order of T.
        single_expert_ratio: float64 [L], share of Mixtral-8x7B's tokens run with one expert in the
            authors' own use of the rule.
        prefetch_accuracy: float64 [L], share of its needed experts that are predicted; 0 for the
            first layer, which nothing predicts.
        slots: int64 [L] by their sum, what the authors' allocator made of these two.
    """

    source: str
    sensitivity: Mapping[str, NDArray[np.float64]]
    mmlu: Mapping[str, tuple[PublishedRun, ...]]
    single_expert_ratio: NDArray[np.float64]
    prefetch_accuracy: NDArray[np.float64]
    slots: Mapping[int, NDArray[np.int64]]

    def __post_init__(self) -> None:
        """Freeze the mappings and their arrays."""
        frozen = {
            model: frozen_array(f"sensitivity of {model}", values, np.float64, (None,))
            for model, values in self.sensitivity.items()
        }
        object.__setattr__(self, "sensitivity", MappingProxyType(frozen))
        object.__setattr__(self, "mmlu", MappingProxyType(dict(self.mmlu)))
        for name in ("single_expert_ratio", "prefetch_accuracy"):
            array = frozen_array(name, getattr(self, name), np.float64, (None,))
            object.__setattr__(self, name, array)
        slots = {n: frozen_array("slots", s, np.int64, (None,)) for n, s in self.slots.items()}
        object.__setattr__(self, "slots", MappingProxyType(slots))

    @classmethod
    def load(cls, path: str | Path) -> PublishedAdapMoE:
        """Read the published numbers from their JSON file.

        Raises:
            RecordError: the file does not hold them.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            stored = known_values(document, "the file", STORED)
            return cls(
                source=stored["source"],
                sensitivity={
                    f"mixtral-{name.removeprefix(SENSITIVITY_PREFIX)}": values
                    for name, values in stored.items()
                    if name.startswith(SENSITIVITY_PREFIX)
                },
                mmlu={
                    evaluation: tuple(_run(entry, evaluation) for entry in entries)
                    for evaluation, entries in stored["mmlu_8x7b"].items()
                },
                single_expert_ratio=stored["single_expert_ratio_8x7b"],
                prefetch_accuracy=stored["prefetch_accuracy_8x7b"],
                slots=_gated_slots(stored["allocations"]),
            )
        except RecordError as error:
            raise RecordError(
                f"{path} does not hold AdapMoE's published numbers: {error}"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordError(
                f"{path} does not hold AdapMoE's published numbers: {error!r}."
            ) from error


def _run(entry: Any, evaluation: str) -> PublishedRun:
    run = known_values(entry, f"a run of {evaluation}", STORED_OF_RUN)
    return PublishedRun(run["threshold"], run["accuracy"], run["per_layer"])


def _gated_slots(allocations: Mapping[str, Any]) -> dict[int, NDArray[np.int64]]:
    """Return the published slots [L] of the allocations with gating, by their sum."""
    read = {
        name: known_values(entry, f"allocation {name!r}", STORED_OF_ALLOCATION)
        for name, entry in allocations.items()
    }
    gated = [
        entry["published_slots"] for name, entry in read.items() if name.endswith(GATED_SUFFIX)
    ]
    return {sum(slots): np.array(slots) for slots in gated}


def published_adapmoe() -> PublishedAdapMoE:
    """Return the published numbers that ship with the project."""
    return PublishedAdapMoE.load(data_folder() / "adapmoe_published.json")
