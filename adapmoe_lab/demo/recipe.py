"""Every choice of one training run, and the learning-rate schedule that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from adapmoe_lab.models.demo_architecture import DemoArchitecture


@dataclass(frozen=True)
class Recipe:
    """How a demo model is trained; the defaults are those of the model that ships.

    Training ends after `minutes` of wall time or `epochs` passes over the text, whichever comes
    first; None leaves that limit off. `size_exponent` sets how often small domains are read (see
    `Mixture.by_size`). `dropout` applies to embeddings and block outputs.
    """

    architecture: DemoArchitecture = field(default_factory=DemoArchitecture)
    minutes: float | None = 8.0
    epochs: float | None = None
    sequence_length: int = 512
    batch_sequences: int = 64
    learning_rate: float = 2e-3
    warmup: float = 0.02
    weight_decay: float = 0.1
    dropout: float = 0.1
    clip_norm: float = 1.0
    balance_weight: float = 0.01
    size_exponent: float = 0.85
    n_evaluations: int = 20
    development_tokens: int = 16_384
    seed: int = 0

    def __post_init__(self) -> None:
        if self.minutes is None and self.epochs is None:
            raise ValueError("training needs an end: give minutes, epochs, or both.")
        for limit in ("minutes", "epochs"):
            value = getattr(self, limit)
            if value is not None and value <= 0:
                raise ValueError(f"{limit} must be above 0, got {value}.")
        if self.sequence_length > self.architecture.max_positions:
            raise ValueError(
                f"sequence_length {self.sequence_length} exceeds the architecture's "
                f"{self.architecture.max_positions} positions."
            )
        for share in ("warmup", "dropout"):
            value = getattr(self, share)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{share} must lie in [0, 1), got {value}.")

    @property
    def batch_tokens(self) -> int:
        """Tokens predicted in one step."""
        return self.batch_sequences * self.sequence_length

    def progress(self, n_tokens: int, seconds: float, text_tokens: int) -> float:
        """Return how much of the run is over, from 0 to 1, and past 1 once a limit is crossed."""
        done = []
        if self.minutes is not None:
            done.append(seconds / (60 * self.minutes))
        if self.epochs is not None:
            done.append(n_tokens / (self.epochs * text_tokens))
        return max(done)

    def learning_rate_at(self, progress: float) -> float:
        """Return the learning rate: a linear warm-up, then half a cosine down to zero.

        A function of progress, not of the step count, so a run that is cut by the clock still
        ends at zero.
        """
        if progress < self.warmup:
            return self.learning_rate * max(progress / self.warmup, 0.01)
        decay = (min(progress, 1.0) - self.warmup) / (1 - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * decay))

    def as_dict(self) -> dict[str, object]:
        """Return the choices other than the architecture, for the training record."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "architecture"}
