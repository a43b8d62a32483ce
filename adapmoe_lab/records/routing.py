"""Which experts each token was routed to, in every layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records.files import (
    IDENTIFYING,
    RecordError,
    digest,
    frozen_array,
    known_values,
    load_arrays,
    save_arrays,
)
from adapmoe_lab.records.spec import MoESpec

KIND = "routing-trace"
SCHEMA_VERSION = 3
"""The first whose traces may be without `router_probs`."""

OLDEST_VERSION = 1
"""Its predictions have no scores; they are left out."""

UNGATED = "ungated"
EXPERTS, SCORES = "predictions", "prediction_scores"
HAS_SCORES = "has_router_probs"
IN_HEADER = ("spec", "labels", "recorded_under", "fingerprint", HAS_SCORES)
PER_TOKEN = ("token_ids", "expert_indices", "weights", "router_probs", "step_ids", "is_decode")
SMALLER_IN_FILES = MappingProxyType({"expert_indices": np.uint8, "weights": np.float16})
"""Types that a file holds values in where they are exact."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What was predicted of T tokens in L layers, C candidates each, the likeliest first.

    Attributes:
        experts: int16 [T, L, C] by the layer they are predicted for; -1 where there is none.
        scores: float16 [T, L, C], the router's score predicted of each; 0 where there is none.
    """

    experts: NDArray[np.int16]
    scores: NDArray[np.float16]

    def __post_init__(self) -> None:
        """Freeze both arrays and check that they fit each other."""
        experts = frozen_array("predicted experts", self.experts, np.int16, (None, None, None))
        scores = frozen_array("predicted scores", self.scores, np.float16, experts.shape)
        object.__setattr__(self, "experts", experts)
        object.__setattr__(self, "scores", scores)

    @property
    def n_candidates(self) -> int:
        """C, the experts named per token and layer."""
        return self.experts.shape[2]

    def of(self, tokens: Any) -> Prediction:
        """Return what was predicted of some tokens: a slice, a mask or indices."""
        return Prediction(self.experts[tokens], self.scores[tokens])


Predictions = Mapping[str, Mapping[int, Prediction]]
"""By predictor, and by layers from where it looks to the layer it predicts.

The distance is 0 for a predictor that knows before the forward pass begins.
"""


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Recorded routing of T tokens through L layers of E experts, K chosen per token.

    Attributes:
        spec: the model that was recorded.
        token_ids: int32 [T].
        expert_indices: int16 [T, L, K], as the router gave them.
        weights: float32 [T, L, K], the router's own, before gating.
        router_probs: float16 [T, L, E]; None if only the chosen experts were kept.
        predictions: what was predicted meanwhile, by predictor and distance in layers.
        sequence_starts: int64 [S], index of each sequence's first token.
        step_ids: int64 [T], ascending; tokens of one forward pass share a step.
        is_decode: bool [T], whether the token was run on its own after a prompt.
        labels: one label per sequence.
        recorded_under: fingerprint of the gating and compensation in force, `ungated` for none.
    """

    spec: MoESpec
    token_ids: NDArray[np.int32]
    expert_indices: NDArray[np.int16]
    weights: NDArray[np.float32]
    router_probs: NDArray[np.float16] | None
    predictions: Predictions
    sequence_starts: NDArray[np.int64]
    step_ids: NDArray[np.int64]
    is_decode: NDArray[np.bool_]
    labels: tuple[str, ...]
    recorded_under: str = UNGATED

    def __post_init__(self) -> None:
        """Freeze every array and check that they describe the same tokens and model."""
        n_tokens = len(self.token_ids)
        chosen = (n_tokens, self.spec.n_layers, self.spec.top_k)
        every = (n_tokens, self.spec.n_layers, self.spec.n_experts)
        for name, dtype, shape in (
            ("token_ids", np.int32, (n_tokens,)),
            ("expert_indices", np.int16, chosen),
            ("weights", np.float32, chosen),
            ("router_probs", np.float16, every),
            ("sequence_starts", np.int64, (None,)),
            ("step_ids", np.int64, (n_tokens,)),
            ("is_decode", np.bool_, (n_tokens,)),
        ):
            if name == "router_probs" and self.router_probs is None:
                continue
            array = frozen_array(name, getattr(self, name), dtype, shape)
            object.__setattr__(self, name, array)
        frozen = {
            predictor: MappingProxyType({int(distance): p for distance, p in by_distance.items()})
            for predictor, by_distance in self.predictions.items()
        }
        object.__setattr__(self, "predictions", MappingProxyType(frozen))
        object.__setattr__(self, "labels", tuple(self.labels))
        self._check()

    def _check(self) -> None:
        starts, indices = self.sequence_starts, self.expert_indices
        if not self.n_tokens or not len(starts) or starts[0] != 0 or (np.diff(starts) <= 0).any():
            raise RecordError("A trace needs tokens, and ascending sequence_starts from 0.")
        if starts[-1] >= self.n_tokens:
            raise RecordError("A sequence of the trace starts after its last token.")
        if len(self.labels) != len(starts):
            raise RecordError(f"{len(starts)} sequences need as many labels, got {self.labels}.")
        if (np.diff(self.step_ids) < 0).any():
            raise RecordError("step_ids must not descend.")
        if indices.min() < 0 or indices.max() >= self.spec.n_experts:
            raise RecordError(f"expert_indices must lie in 0..{self.spec.n_experts - 1}.")
        for name, prediction in self._named_predictions():
            self._check_prediction(name, prediction)

    def _check_prediction(self, name: str, prediction: Prediction) -> None:
        experts, wanted = prediction.experts, (self.n_tokens, self.spec.n_layers)
        if experts.shape[:2] != wanted or not experts.shape[2]:
            raise RecordError(
                f"Prediction {name} must have shape [{wanted[0]}, {wanted[1]}, 1 or more], got "
                f"{list(experts.shape)}."
            )
        if experts.min() < -1 or experts.max() >= self.spec.n_experts:
            raise RecordError(
                f"Prediction {name} must name experts 0..{self.spec.n_experts - 1}, or -1 for none."
            )

    def _named_predictions(self) -> Iterator[tuple[str, Prediction]]:
        for predictor, by_distance in self.predictions.items():
            for distance, prediction in by_distance.items():
                yield f"{predictor}/{distance}", prediction

    def _per_token(self) -> Iterator[tuple[str, NDArray[Any]]]:
        for name in PER_TOKEN:
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    @property
    def n_tokens(self) -> int:
        """T, the number of recorded tokens."""
        return len(self.token_ids)

    @property
    def shares(self) -> NDArray[np.float32]:
        """Weight of each chosen expert over the token's sum, float32 [T, L, K]."""
        return self.weights / self.weights.sum(axis=2, keepdims=True)

    def all_router_probs(self) -> NDArray[np.float16]:
        """Return `router_probs`, for what cannot do without.

        Raises:
            RecordError: the trace is of the chosen experts only.
        """
        if self.router_probs is None:
            raise RecordError(
                "The trace is without router_probs, the router's scores of all experts, which are "
                "needed here: only the chosen experts and their weights were kept. Record the "
                "model with `profile`, or choose what reads no scores."
            )
        return self.router_probs

    def chosen_only(self) -> RoutingTrace:
        """Return the trace of the chosen experts and their weights, these rounded to float16.

        Without the scores of all experts and without predictions its file is several times smaller.
        """
        weights = self.weights.astype(np.float16).astype(np.float32)
        return replace(self, weights=weights, router_probs=None, predictions={})

    def as_decode(self) -> RoutingTrace:
        """Return the trace with every token a decode step of its own.

        Routing of a token depends only on the tokens before it, so a causal model routes a
        token alike whether it comes in a prompt or on its own.
        """
        return replace(
            self,
            step_ids=np.arange(self.n_tokens),
            is_decode=np.ones(self.n_tokens, dtype=np.bool_),
        )

    def first(self, n_tokens: int) -> RoutingTrace:
        """Return the trace of the first `n_tokens` tokens."""
        n_tokens = min(n_tokens, self.n_tokens)
        starts = self.sequence_starts[self.sequence_starts < n_tokens]
        return self._at(slice(n_tokens), sequence_starts=starts, labels=self.labels[: len(starts)])

    def of_sequences(self, numbers: Sequence[int]) -> RoutingTrace:
        """Return the trace of some sequences, numbered from 0, in the order given.

        Steps are counted anew, and none reaches over the end of a sequence.
        """
        ends = np.append(self.sequence_starts[1:], self.n_tokens)
        parts = [np.arange(self.sequence_starts[n], ends[n]) for n in numbers]
        tokens = np.concatenate([*parts, np.arange(0)])
        starts = np.cumsum([0, *map(len, parts)])[:-1]
        begins = np.zeros(len(tokens), dtype=np.int64)
        begins[1:] = np.diff(self.step_ids[tokens]) != 0
        begins[starts[1:]] = 1
        return self._at(
            tokens,
            step_ids=np.cumsum(begins),
            sequence_starts=starts,
            labels=[self.labels[n] for n in numbers],
        )

    def _at(self, tokens: Any, **others: Any) -> RoutingTrace:
        """Return the trace with everything per token taken at some, and other fields given."""
        arrays = {name: array[tokens] for name, array in self._per_token()}
        predictions = {
            predictor: {distance: p.of(tokens) for distance, p in by_distance.items()}
            for predictor, by_distance in self.predictions.items()
        }
        return replace(self, **{**arrays, "predictions": predictions, **others})

    def check_model(self, spec: MoESpec) -> None:
        """Raise RecordError unless it was recorded on this model's weights."""
        spec.check_made_for(
            self.spec.fingerprint(),
            f"The trace was recorded on {self.spec.model_id!r}",
            "Profile this model.",
        )

    def check_ungated(self) -> None:
        """Raise RecordError if it was recorded while experts were skipped.

        What was skipped changes the hidden states, and by them what later routers choose.
        """
        if self.recorded_under != UNGATED:
            raise RecordError(
                "Cuts are chosen on a trace of the model as it is; this one was recorded while "
                f"experts were skipped (gating {self.recorded_under}). Profile with nothing "
                "skipped: `with model.running(TunedConfig.untuned(model.spec)): profile(...)`."
            )

    def fingerprint(self) -> str:
        """Identify the trace by its model, tokens, routing, gating and what was predicted."""
        routed = (self.token_ids, self.expert_indices, self.weights, self.step_ids)
        predicted = [
            part
            for name, prediction in self._named_predictions()
            for part in (name, prediction.experts.tobytes(), prediction.scores.tobytes())
        ]
        parts = (*(array.tobytes() for array in routed), *predicted)
        return digest(self.spec.fingerprint(), self.recorded_under, *parts)

    def save(self, path: str | Path) -> Path:
        """Write the trace to one .npz file, whole or not at all, and return its path.

        Experts are written as uint8 and weights as float16 where nothing is lost by it.
        """
        path = Path(path)
        arrays = {**dict(self._per_token()), "sequence_starts": self.sequence_starts}
        for name, dtype in SMALLER_IN_FILES.items():
            arrays[name] = _exactly_as(dtype, arrays[name])
        for name, prediction in self._named_predictions():
            arrays[f"{EXPERTS}/{name}"] = prediction.experts
            arrays[f"{SCORES}/{name}"] = prediction.scores
        header: dict[str, Any] = {
            "spec": self.spec.to_json(),
            "labels": list(self.labels),
            "recorded_under": self.recorded_under,
            "fingerprint": self.fingerprint(),
            HAS_SCORES: self.router_probs is not None,
        }
        save_arrays(path, KIND, SCHEMA_VERSION, header, arrays)
        return path

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read a saved trace; of one in version 1, without its predictions.

        Raises:
            FileNotFoundError: there is no such file.
            RecordError: damaged, of another kind or version, or not what was saved.
        """
        path = Path(path)
        header, arrays = load_arrays(path, KIND, SCHEMA_VERSION, OLDEST_VERSION)
        header = known_values(header, str(path), (*IDENTIFYING, *IN_HEADER), (HAS_SCORES,))
        scores = {
            name: name.replace(EXPERTS, SCORES, 1)
            for name in arrays
            if re.fullmatch(rf"{EXPERTS}/[^/]+/\d+", name)
        }
        version = header["schema_version"]
        later = scores.values() if version == OLDEST_VERSION else ()
        is_chosen_only = version == SCHEMA_VERSION and not header.get(HAS_SCORES, False)
        optional = ("router_probs",) if is_chosen_only else ()
        names = (*PER_TOKEN, "sequence_starts", *scores, *scores.values())
        arrays = known_values(arrays, str(path), names, (*later, *optional))
        arrays.setdefault("router_probs", None)
        predictions: dict[str, dict[int, Prediction]] = {}
        for name, scores_name in scores.items():
            _, predictor, distance = name.split("/")
            experts = arrays.pop(name)
            if scores_name in arrays:
                prediction = Prediction(experts, arrays.pop(scores_name))
                predictions.setdefault(predictor, {})[int(distance)] = prediction
        trace = cls(
            spec=MoESpec.from_json(header["spec"], f"{path}, section 'spec',"),
            predictions=predictions,
            labels=tuple(header["labels"]),
            recorded_under=header["recorded_under"],
            **arrays,
        )
        if trace.fingerprint() != header["fingerprint"]:
            raise RecordError(f"{path} does not hold the trace that was saved; record it again.")
        return trace


def _exactly_as(dtype: Any, array: NDArray[Any]) -> NDArray[Any]:
    """Return an array as another type, or unchanged if that type does not hold its values."""
    with np.errstate(over="ignore"):
        other = array.astype(dtype)
    return other if np.array_equal(other.astype(array.dtype), array) else array
