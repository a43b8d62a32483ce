"""One backward pass per text, reduced layer by layer to what the estimators need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.layer_pass import LayerGradient
from adapmoe_lab.policies.gating.keep import keep_by_cuts
from adapmoe_lab.profiling.sensitivity.backward import backpropagate
from adapmoe_lab.profiling.sensitivity.estimators import ESTIMATORS, SkipEffects


@dataclass(frozen=True, eq=False)
class GradientTerms:
    """Means over the tokens of one text; C estimators, L layers, B cuts.

    Attributes:
        squares: float64 [L], ||dL/dy||^2 at each layer's expert output y.
        terms: float64 [C, L, B], each estimator's term at every cut.
        first_order: float64 [L, B], the product of dL/dy and what every cut changes of y.
        skipped: float64 [L, B], share of the activations that every cut skips.
    """

    squares: NDArray[np.float64]
    terms: NDArray[np.float64]
    first_order: NDArray[np.float64]
    skipped: NDArray[np.float64]


def gradient_terms(
    model: LabModel,
    ids: torch.Tensor,
    estimators: Sequence[str],
    cuts: NDArray[np.float64],
    renormalise: bool,
) -> GradientTerms:
    """Differentiate a text's loss, token ids int64 [T], and reduce every layer's gradient at once.

    What the engine's surrogates would put in an expert's place counts as kept.
    """
    by_layer, surrogates = {}, model.engine.surrogates
    gains = np.zeros(model.spec.n_layers) if surrogates is None else surrogates.gain

    def read(found: LayerGradient) -> None:
        by_layer[found.layer] = _terms_of(
            found, estimators, cuts, float(renormalise) + gains[found.layer]
        )

    backpropagate(model, ids, read)
    squares, terms, first_order, skipped = zip(
        *(by_layer[i] for i in sorted(by_layer)), strict=True
    )
    return GradientTerms(
        np.array(squares), np.stack(terms, axis=1), np.array(first_order), np.array(skipped)
    )


def _terms_of(
    found: LayerGradient,
    estimators: Sequence[str],
    cuts: NDArray[np.float64],
    gain: float,
) -> tuple[float, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return squares, terms [C, B], first_order [B] and skipped [B] of one layer.

    `gain` is what the kept weights grow by, per weight dropped over weight kept.
    """
    gradient, outputs = found.gradient.float(), found.contributions.float()
    weights = found.weights.float().cpu().numpy()
    lost = outputs
    if found.surrogate_contributions is not None:
        lost = outputs - found.surrogate_contributions
    parts = torch.cat([lost, outputs], dim=1)  # [T, 2K, D]
    effects = SkipEffects(
        weights=weights.astype(np.float64),
        along=_on_host(torch.einsum("td,tpd->tp", gradient, parts)),
        products=_on_host(torch.einsum("tpd,tqd->tpq", parts, parts)),
        width=parts.shape[-1],
        gain=gain,
    )
    terms, (first_order, skipped) = np.empty((len(estimators), len(cuts))), np.empty((2, len(cuts)))
    for b, cut in enumerate(cuts):
        row = np.full(weights.shape[1] - 1, cut, dtype=np.float32)
        dropped = found.keep & ~keep_by_cuts(weights, row)
        skipped[b] = dropped.mean()
        first_order[b] = effects.first_order(dropped).mean()
        terms[:, b] = [ESTIMATORS[name].of_tokens(effects, dropped).mean() for name in estimators]
    return float((gradient**2).sum(dim=1).mean()), terms, first_order, skipped


def _on_host(values: torch.Tensor) -> NDArray[np.float64]:
    return values.double().cpu().numpy()
