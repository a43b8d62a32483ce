"""Fitting predictors: what predicts the experts of a later layer, or of the first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.observing import observing
from adapmoe_lab.engine.prefetch.predictors import MAX_DISTANCE, TokenEmbedding, predictors_of
from adapmoe_lab.evaluation.loss import token_sequences
from adapmoe_lab.evaluation.texts import Texts
from adapmoe_lab.models.families import router_logits, router_scores
from adapmoe_lab.profiling.activations import Activations, recorded_activations
from adapmoe_lab.profiling.predictors.linear_maps import fit_gate, fit_ridges
from adapmoe_lab.records import Predictors, TunedConfig
from adapmoe_lab.records.arguments import whole_number
from adapmoe_lab.records.files import digest
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.progress import Progress
from adapmoe_lab.simulation.statistics.token_means import means_by_token

HELD_OUT_EVERY = 4
"""Of so many texts one is held out to choose how strongly a fit is held back.

Of a single text, so large a part at its end.
"""
FEWEST_TOKENS = 3
"""One held out, one to fit to, and one before them both."""


def fit_predictors(
    model: LabModel,
    texts: Texts,
    *,
    max_distance: int = MAX_DISTANCE,
    max_tokens: int = 512,
    progress: Progress | None = None,
) -> Predictors:
    """Fit linear predictors of later layers, a table of tokens, and a gate for the first layer.

    The texts are run once, ungated, and what the experts were given is kept on disk; then every
    layer is fitted on its own.

    Args:
        model: the model; its configuration plays no part.
        texts: calibration texts, one sequence each; of a single one the end is held out.
        max_distance: layers ahead that are fitted.
        max_tokens: longer texts are cut to this many tokens.
        progress: called with (done, total, text); what it raises stops the run.

    Raises:
        UnsupportedModelError: the routers read something else than the experts' input.
        ValueError: there is no text, one is too short or something else.
    """
    max_distance = whole_number("max_distance", max_distance, at_least=0)
    sequences = token_sequences(model, texts, max_tokens)
    if len(sequences) == 1 and len(sequences[0]) < FEWEST_TOKENS:
        raise ValueError(
            "Predictors are fitted to some tokens and held back by others; a single text needs at "
            f"least {FEWEST_TOKENS} tokens, got {len(sequences[0])}. Give more text."
        )
    states: list[torch.Tensor] = []

    def keep_state(last_hidden: torch.Tensor) -> None:
        states.append(last_hidden.float().cpu())

    with (
        torch.no_grad(),
        model.running(TunedConfig.untuned(model.spec)),
        observing(model, {HookPoint.LAST_HIDDEN: keep_state}),
        recorded_activations(model, sequences, progress=progress) as activations,
    ):
        tokens = _Tokens(sequences, model.engine.device)
        ridge = _fit_ridge_maps(model, activations, tokens, max_distance, progress)
        first = model.layers[0].router
        scores = router_scores(first, activations.layer(0).hidden.to(model.engine.device))
        table = _token_table(model, tokens, scores)
        last_hidden = _fit_first_gate(torch.cat(states).to(scores.device), scores, tokens)
    return Predictors(
        model_fingerprint=model.spec.fingerprint(),
        ridge=ridge,
        table_tokens=np.unique(tokens.ids),
        token_table=table,
        last_hidden=last_hidden.float().cpu().numpy(),
        n_tokens=len(tokens.ids),
        texts=digest(*(ids.numpy().tobytes() for ids in sequences)),
    )


class _Tokens:
    """The T tokens of all sequences in a row.

    Attributes:
        ids: int64 [T].
        is_held_out: bool [T], on the device.
        is_first: bool [T], on the device: whether a token begins its sequence.
    """

    def __init__(self, sequences: Sequence[torch.Tensor], device: torch.device) -> None:
        lengths = [len(ids) for ids in sequences]
        numbers = np.repeat(np.arange(len(lengths)), lengths)
        self.ids = np.concatenate([ids.numpy() for ids in sequences])
        is_held_out = numbers % HELD_OUT_EVERY == 1
        if len(lengths) == 1:
            is_held_out[-max(1, lengths[0] // HELD_OUT_EVERY) :] = True
        is_first = np.diff(numbers, prepend=-1) > 0
        self.is_held_out = torch.from_numpy(is_held_out).to(device)
        self.is_first = torch.from_numpy(is_first).to(device)


def _fit_ridge_maps(
    model: LabModel,
    activations: Activations,
    tokens: _Tokens,
    max_distance: int,
    progress: Progress | None,
) -> dict[int, NDArray[np.float32]]:
    """Return the maps [L, D+1, E] by distance; every layer is read once, the last one first."""
    n_layers, device = len(model.layers), model.engine.device
    shape = n_layers, model.spec.hidden_size + 1, model.spec.n_experts
    ridge = {
        distance: np.zeros(shape, dtype=np.float32)
        for distance in range(1, min(max_distance, n_layers - 1) + 1)
    }
    later: list[tuple[torch.Tensor, torch.Tensor]] = []  # the next layers' logits and choices
    for layer in reversed(range(n_layers)):
        if progress is not None:
            progress(n_layers - 1 - layer, n_layers, "fitting predictors")
        seen = activations.layer(layer)
        hidden = seen.hidden.to(device)
        if later:
            maps = fit_ridges(hidden, later, tokens.is_held_out)
            for distance, fitted in enumerate(maps, start=1):
                ridge[distance][layer + distance] = fitted.cpu().numpy()
        logits = router_logits(model.layers[layer].router, hidden)
        later = [(logits, torch.from_numpy(seen.indices).to(device)), *later][: len(ridge)]
    return ridge


def _token_table(model: LabModel, tokens: _Tokens, scores: torch.Tensor) -> NDArray[np.float64]:
    """Return the router scores of layer 0 to expect of each distinct token, [N, E].

    Drawn towards what the token's embedding predicts, or else the mean of all tokens.
    """
    expected = scores.mean(dim=0)
    for predictor in predictors_of(model.hf, model.layers):
        if isinstance(predictor, TokenEmbedding):
            distinct = torch.from_numpy(np.unique(tokens.ids)).to(scores.device)
            expected = predictor.scores(0, 0, distinct)
    return means_by_token(tokens.ids, scores.cpu().numpy(), expected.cpu().numpy())


def _fit_first_gate(states: torch.Tensor, scores: torch.Tensor, tokens: _Tokens) -> torch.Tensor:
    """Return the gate [D+1, E] from each token's last hidden state to layer 0 for the next one."""
    following = (~tokens.is_first).nonzero()[:, 0]
    shares = scores[following] / scores[following].sum(dim=-1, keepdim=True)
    return fit_gate(states[following - 1], shares, tokens.is_held_out[following])
