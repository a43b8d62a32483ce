"""How skipping changes the loss, measured: the same texts with and without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.records import GatingTable, TunedConfig
from adapmoe_lab.records.progress import Progress
from adapmoe_lab.simulation.statistics.jackknife import jackknife

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LossChanges:
    """What C gating tables change on S texts, summed over the tokens each text predicts.

    Attributes:
        loss: float64 [S, C], increase of the loss of the text's own next tokens, in nats.
        divergence: float64 [S, C], Kullback-Leibler divergence of the next-token distribution
            from the ungated one: the increase expected over what the model itself holds possible.
        n_predicted: int64 [S], tokens predicted.
        skipped: float64 [S, C], share of the expert activations that were skipped.
    """

    loss: Floats
    divergence: Floats
    n_predicted: NDArray[np.int64]
    skipped: Floats

    def of_tables(self, chosen: slice) -> LossChanges:
        """Return the changes under some of the tables."""
        loss, divergence, skipped = (
            values[:, chosen] for values in (self.loss, self.divergence, self.skipped)
        )
        return LossChanges(loss, divergence, self.n_predicted, skipped)

    @property
    def skipped_fraction(self) -> Floats:
        """Share of all expert activations that each table skipped, float64 [C]."""
        return (self.n_predicted @ self.skipped) / self.n_predicted.sum()

    @property
    def mean_ablation(self) -> tuple[Floats, Floats]:
        """Loss increase in nats per token, float64 [C], and its standard errors."""
        return self._mean(self.loss)

    @property
    def mean_divergence(self) -> tuple[Floats, Floats]:
        """Divergence in nats per token, float64 [C], and its standard errors."""
        return self._mean(self.divergence)

    def _mean(self, summed: Floats) -> tuple[Floats, Floats]:
        per_token = summed / self.n_predicted[:, None]
        return jackknife(lambda weights: weights @ per_token, self.n_predicted)


def loss_changes(
    model: LabModel,
    ungated: TunedConfig,
    sequences: Sequence[torch.Tensor],
    tables: Sequence[GatingTable],
    progress: Progress | None = None,
) -> LossChanges:
    """Run every text, token ids int64 [T], ungated and under each table.

    `ungated` is the config without its gating: its surrogates stay.
    """
    found = []
    with torch.no_grad(), model.running(ungated), model.engine.reading_store():
        for done, ids in enumerate(sequences):
            if progress is not None:
                progress(done, len(sequences), "measuring what skipping costs")
            found.append(_of_text(model, ids, tables))
    loss, divergence, skipped = np.array(found).transpose(2, 0, 1)
    n_predicted = np.array([len(ids) - 1 for ids in sequences])
    return LossChanges(loss, divergence, n_predicted, skipped)


def _of_text(
    model: LabModel, ids: torch.Tensor, tables: Sequence[GatingTable]
) -> list[tuple[float, float, float]]:
    """Return a text's summed loss increase, divergence, and skipping under each table."""
    ids = ids.to(model.engine.device)

    def log_probabilities() -> torch.Tensor:
        logits = model.hf(input_ids=ids[None], use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(-1)

    whole = log_probabilities()
    probabilities, following = whole.exp(), ids[1:, None].to(whole.device)
    changes = []
    for table in tables:
        before = model.engine.traffic
        with model.engine.gated_by(table):
            change = whole - log_probabilities()
        loss = float(change.gather(1, following).double().sum())
        divergence = float((probabilities * change).double().sum())
        skipped = (model.engine.traffic - before).skipped_fraction
        changes.append((loss, divergence, skipped))
    return changes
