"""What skipping experts costs: Fisher information, and a second-order estimate in nats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.loading import LabModel
from adapmoe_lab.engine.offload import LayerPass
from adapmoe_lab.evaluation.loss import token_sequences
from adapmoe_lab.policies.gating import keep_by_cuts
from adapmoe_lab.records import GatingTable, SensitivityProfile, TunedConfig

Progress = Callable[[int, int, str], None]

N_CUTS = 33
REFERENCE_SKIPPED_FRACTION = 0.2


def sensitivity(
    model: LabModel,
    texts: Sequence[str],
    *,
    max_tokens: int = 256,
    calibrate: bool = True,
    progress: Progress | None = None,
) -> SensitivityProfile:
    """Measure how much the loss depends on each layer's experts.

    `cost` is AdapMoE's S_l, the trace of the Fisher information of the summed next-token loss
    with respect to layer l's expert output y: the mean over tokens of ||dL/dy||^2
    (arXiv 2408.10284, section 4.1). Beside it, with g = dL/dy and dy what a cut would drop,
    mean (g . dy)^2 / 2 estimates the loss increase of every cut on a grid, one layer at a time.
    With `calibrate` all layers skip at once at one reference cut, and the ratio of the measured
    increase to the estimated one is kept as `scale`. What is measured there is the Kullback-Leibler
    divergence from the ungated model: the loss increase averaged over what the model itself holds
    possible, which one text's own next tokens would only sample.

    Args:
        model: the model; experts are read from host memory, its configuration plays no part.
        texts: calibration texts the model has not memorised, one sequence each.
        max_tokens: longer texts are cut to this many tokens.
        calibrate: whether to anchor the estimate to a measured divergence.
        progress: called with (done, total, text); what it raises stops the run.
    """
    sequences = token_sequences(model, texts, max_tokens)
    cuts = np.linspace(1 / model.spec.top_k, 1.0, N_CUTS)
    squares, increases, top_shares = [], [], []
    with model.running(_ungated(model)), model.engine.reading_store():
        for done, ids in enumerate(sequences):
            if progress is not None:
                progress(done, len(sequences), "measuring sensitivity")
            square, increase, share = _one_sequence(model, ids, cuts)
            squares.append(square)
            increases.append(increase)
            top_shares.append(share)
    n_tokens = np.array([len(ids) for ids in sequences])
    cost, cost_se = _mean_over_sequences(np.array(squares), n_tokens)
    increase, increase_se = _mean_over_sequences(np.array(increases), n_tokens)
    profile = SensitivityProfile(
        model_fingerprint=model.spec.fingerprint(),
        estimator="fisher",
        cost=cost,
        standard_error=cost_se,
        n_tokens=int(n_tokens.sum()),
        n_sequences=len(sequences),
        cuts=cuts,
        increase_nats=increase,
        increase_se=increase_se,
    )
    if not calibrate or model.spec.top_k == 1:
        return profile
    cut = float(np.quantile(np.concatenate(top_shares), 1 - _reference_quantile(model)))
    return _calibrated(profile, model, sequences, cut, progress)


def _ungated(model: LabModel) -> TunedConfig:
    return TunedConfig.untuned(model.spec)


def _reference_quantile(model: LabModel) -> float:
    """Share of tokens whose best expert alone reaches the reference cut."""
    top_k = model.spec.top_k
    return min(1.0, REFERENCE_SKIPPED_FRACTION * top_k / (top_k - 1))


def _calibrated(
    profile: SensitivityProfile,
    model: LabModel,
    sequences: Sequence[torch.Tensor],
    cut: float,
    progress: Progress | None,
) -> SensitivityProfile:
    """Return the profile with its scale set by one measured divergence."""
    uniform = np.full(profile.n_layers, cut)
    table = GatingTable.per_layer(uniform, model.spec.top_k)
    divergences = []
    with torch.no_grad(), model.running(_ungated(model)), model.engine.reading_store():
        for done, ids in enumerate(sequences):
            if progress is not None:
                progress(done, len(sequences), "anchoring the estimate")
            divergences.append(_divergence(model, ids, table))
    n_tokens = np.array([len(ids) for ids in sequences])
    measured, error = _mean_over_sequences(np.array(divergences), n_tokens)
    estimated = float(profile.increase(uniform)[0].sum())
    if estimated <= 0:
        return profile
    return replace(profile, scale=float(measured) / estimated, scale_se=float(error) / estimated)


def _divergence(model: LabModel, ids: torch.Tensor, table: GatingTable) -> float:
    """Return the mean divergence in nats of the next-token distribution under a gating table."""
    inputs = {"input_ids": ids[None].to(model.engine.device), "use_cache": False}
    whole = model.hf(**inputs).logits[0].float().log_softmax(-1)
    with model.engine.gated_by(table):
        gated = model.hf(**inputs).logits[0].float().log_softmax(-1)
    return float((whole.exp() * (whole - gated)).sum(-1).mean())


class _GradientTap:
    """Keeps every layer's expert output, and what each choice contributed to it."""

    def __init__(self) -> None:
        self.passes: list[LayerPass] = []

    def __call__(self, layer_pass: LayerPass) -> None:
        layer_pass.output.retain_grad()
        self.passes.append(layer_pass)


def _one_sequence(
    model: LabModel, ids: torch.Tensor, cuts: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float32]]:
    """Return ||dL/dy||^2 [L], the estimated increase [L, B], both token means, and top shares."""
    tap = _GradientTap()
    embedded = model.hf.get_input_embeddings()(ids[None].to(model.engine.device))
    with torch.enable_grad(), model.engine.observed_by(tap):
        logits = model.hf(inputs_embeds=embedded.requires_grad_(), use_cache=False).logits[0]
        targets = ids[1:].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits[:-1].float(), targets, reduction="sum")
        loss.backward()
    squares, increases, top_shares = [], [], []
    for passed in tap.passes:
        gradient = passed.output.grad.float()  # pyright: ignore[reportOptionalMemberAccess]
        along = torch.einsum("td,tkd->tk", gradient, passed.contributions.detach().float())
        effects = along.cpu().double().numpy()
        squares.append(float((gradient**2).sum(dim=1).mean()))
        dropped = [(effects * ~keep_by_cuts(passed.weights, _row(c, effects))) for c in cuts]
        increases.append([0.5 * float((d.sum(axis=1) ** 2).mean()) for d in dropped])
        top_shares.append((passed.weights / passed.weights.sum(axis=1, keepdims=True)).max(axis=1))
    return np.array(squares), np.array(increases), np.concatenate(top_shares)


def _row(cut: float, effects: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.full(effects.shape[1] - 1, cut, dtype=np.float32)


def _mean_over_sequences(
    values: NDArray[np.float64], n_tokens: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the token-weighted mean over the first axis and its standard error."""
    weights = (n_tokens / n_tokens.sum()).reshape(-1, *[1] * (values.ndim - 1))
    mean = (weights * values).sum(axis=0)
    n = len(values)
    if n < 2:
        return mean, np.full(mean.shape, np.nan)
    variance = (weights**2 * (values - mean) ** 2).sum(axis=0) * n / (n - 1)
    return mean, np.sqrt(variance)
