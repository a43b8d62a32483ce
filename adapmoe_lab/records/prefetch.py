"""What is prefetched: by which predictors, and how far each is trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records.files import RecordError, digest, fields_of, frozen_array, known_values
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.predictors import Predictors

HOOK_POINTS: Mapping[str, HookPoint] = MappingProxyType(
    {
        "token_table": HookPoint.TOKEN,
        "token_embedding": HookPoint.TOKEN,
        "next_router": HookPoint.EXPERTS_INPUT,
        "ridge": HookPoint.EXPERTS_INPUT,
        "own_norm": HookPoint.LAYER_OUTPUT,
        "last_hidden": HookPoint.LAST_HIDDEN,
    }
)
"""The hook point at which each predictor predicts."""

FITTED = ("ridge", "token_table", "last_hidden")
"""Predictors that have to be fitted."""


@dataclass(frozen=True, eq=False)
class PrefetchSource:
    """One predictor at one distance, and how often its candidates are right.

    Attributes:
        predictor: one of `HOOK_POINTS`.
        distance: layers from the one it is queried at to the one it predicts; 0 for those that
            predict the first layer before it is reached.
        probability: float64 [L, C], chance that the candidate of each rank, likeliest first, will
            be needed in each layer predicted; 0 is never prefetched.
    """

    predictor: str
    distance: int
    probability: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Freeze the probabilities and check that the predictor predicts at this distance."""
        if self.predictor not in HOOK_POINTS:
            raise RecordError(
                f"Predictor {self.predictor!r} is unknown; expected one of "
                f"{', '.join(HOOK_POINTS)}."
            )
        predicts_later = self.hook_point in (HookPoint.EXPERTS_INPUT, HookPoint.LAYER_OUTPUT)
        if (self.distance > 0) != predicts_later or self.distance < 0:
            raise RecordError(
                f"Predictor {self.predictor!r} predicts "
                + ("later layers, at distances from 1" if predicts_later else "layer 0 only")
                + f"; got distance {self.distance}."
            )
        probability = frozen_array("probability", self.probability, np.float64, (None, None))
        if not ((probability >= 0) & (probability <= 1)).all():
            raise RecordError("Probabilities of predictions must lie in 0..1.")
        object.__setattr__(self, "probability", probability)

    @property
    def hook_point(self) -> HookPoint:
        """Where it is queried."""
        return HOOK_POINTS[self.predictor]


def buffer_bytes(n_slots: int, expert_bytes: int, fitted: Predictors | None = None) -> int:
    """Return the device bytes of a prefetch buffer for the widest expert, and of what is fitted."""
    return n_slots * expert_bytes + (fitted.n_bytes if fitted is not None else 0)


@dataclass(frozen=True, eq=False)
class PrefetchTable:
    """Which predictors are queried, and how much room prefetched experts have.

    Attributes:
        sources: predictors, at most one for each hook point and distance.
        buffer_slots: experts that can be on their way or waiting at once, beside the cache.
        fitted: what was fitted of those predictors that have to be.
    """

    sources: Sequence[PrefetchSource]
    buffer_slots: int
    fitted: Predictors | None = None

    def __post_init__(self) -> None:
        """Order the sources by distance and check that they agree."""
        sources = tuple(sorted(self.sources, key=lambda s: (s.distance, s.hook_point)))
        if not sources or self.buffer_slots < 1:
            raise RecordError(
                f"Prefetch needs a predictor and room for an expert; got {len(sources)} "
                f"predictors and buffer_slots={self.buffer_slots}."
            )
        places = [(source.hook_point, source.distance) for source in sources]
        if len(set(places)) < len(places):
            named = ", ".join(f"{s.predictor} at distance {s.distance}" for s in sources)
            raise RecordError(
                f"One predictor can predict at each hook point and distance; got {named}."
            )
        if len({len(source.probability) for source in sources}) > 1:
            raise RecordError("The predictors' probabilities are for different numbers of layers.")
        unfitted = [s.predictor for s in sources if s.predictor in FITTED]
        if unfitted and self.fitted is None:
            raise RecordError(
                f"{', '.join(unfitted)} must be fitted; give what `fit_predictors` returned."
            )
        object.__setattr__(self, "sources", sources)

    @property
    def n_layers(self) -> int:
        """L, the number of layers predicted."""
        return len(self.sources[0].probability)

    def predicts_at(self, hook_point: HookPoint) -> bool:
        """Whether any of the predictors is queried at a hook point."""
        return any(source.hook_point == hook_point for source in self.sources)

    def n_bytes(self, expert_bytes: int) -> int:
        """Return the device bytes of a buffer for experts of this size, and of what is fitted."""
        return buffer_bytes(self.buffer_slots, expert_bytes, self.fitted)

    def fingerprint(self) -> str:
        """Identify the table by everything it holds."""
        return digest(
            str(self.buffer_slots),
            self.fitted.fingerprint() if self.fitted else "",
            *(f"{s.predictor} {s.distance}" for s in self.sources),
            *(s.probability.tobytes() for s in self.sources),
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that `from_json` reads back; what was fitted is left out."""
        return {
            "sources": [
                {
                    "predictor": source.predictor,
                    "distance": source.distance,
                    "probability": source.probability.tolist(),
                }
                for source in self.sources
            ],
            "buffer_slots": self.buffer_slots,
        }

    @classmethod
    def from_json(
        cls,
        values: Mapping[str, Any],
        fitted: Predictors | None = None,
        source: str = "The prefetch table",
    ) -> PrefetchTable:
        """Build a table from what `to_json` returned, and what was fitted.

        Raises:
            RecordError: a value is unknown, missing or wrong; the text names `source`.
        """
        values = known_values(values, source, ("sources", "buffer_slots"))
        sources = [
            PrefetchSource(**fields_of(PrefetchSource, saved, f"{source}, predictor {number},"))
            for number, saved in enumerate(values["sources"], start=1)
        ]
        return cls(sources, values["buffer_slots"], fitted)
