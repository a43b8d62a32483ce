"""Linear maps from activations to router logits, their strength chosen on tokens held out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import log_softmax

RIDGES = torch.logspace(-5, 1, 13, dtype=torch.float64)
"""Ridges that are tried, in units of the mean eigenvalue of the inputs' second moments."""

DECAYS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Weight decays that are tried for a gate, strongest first, each starting from the one before."""

GATE_ITERATIONS = 60
"""Steps of L-BFGS at most for each."""


def fit_ridges(
    inputs: torch.Tensor,
    targets: Sequence[tuple[torch.Tensor, torch.Tensor]],
    is_held_out: torch.Tensor,
) -> list[torch.Tensor]:
    """Fit one map from the same inputs to the logits of each target, in closed form.

    The ridge is the one whose likeliest experts hold most of the chosen ones on the tokens held
    out; the map is then fitted anew to all tokens. Everything is float64.

    Args:
        inputs: [T, D].
        targets: for each, logits [T, E] and the experts chosen by them [T, K].
        is_held_out: bool [T].

    Returns:
        Maps [D+1, E], the last row the constant.
    """
    fitted = _Regression(inputs[~is_held_out])
    every = _Regression(inputs)
    maps = []
    for logits, chosen in targets:
        tried = fitted.maps(logits[~is_held_out].double(), RIDGES)
        recalls = [_recall(affine(m, inputs[is_held_out]), chosen[is_held_out]) for m in tried]
        best = int(torch.tensor(recalls).argmax())
        maps += every.maps(logits.double(), RIDGES[best : best + 1])
    return maps


class _Regression:
    """Inputs [T, D] made ready to be regressed on with any ridge."""

    def __init__(self, inputs: torch.Tensor) -> None:
        x = inputs.double()
        self._mean = x.mean(dim=0)
        self._centred = x - self._mean
        self._squares, self._axes = torch.linalg.eigh(self._centred.T @ self._centred)
        self._scale = self._squares.mean().clamp(min=torch.finfo(x.dtype).tiny)

    def maps(self, outputs: torch.Tensor, ridges: torch.Tensor) -> list[torch.Tensor]:
        """Return the maps [D+1, E] to outputs [T, E] at relative ridges [n]."""
        along = self._axes.T @ (self._centred.T @ outputs)  # [D, E]
        maps = []
        for ridge in (ridges.to(along) * self._scale).tolist():
            slopes = self._axes @ (along / (self._squares + ridge)[:, None])
            constant = outputs.mean(dim=0) - self._mean @ slopes
            maps.append(torch.cat([slopes, constant[None]]))
        return maps


def fit_gate(inputs: torch.Tensor, shares: torch.Tensor, is_held_out: torch.Tensor) -> torch.Tensor:
    """Fit a map whose softmax has least Kullback-Leibler divergence from shares.

    The weight decay is the one of least divergence on the tokens held out; the map is then fitted
    anew to all tokens. AdapMoE trains its first-layer gate by this loss (arXiv 2408.10284, section
    4.2).

    Args:
        inputs: [T, D].
        shares: each expert's share of a token's router scores [T, E].
        is_held_out: bool [T].

    Returns:
        The map [D+1, E], the last row the constant.
    """
    inputs, shares = inputs.double(), shares.double()
    path = _gates(inputs[~is_held_out], shares[~is_held_out], DECAYS)
    held_out = inputs[is_held_out], shares[is_held_out]
    losses = [float(_divergence(gate, *held_out)) for gate in path]
    n_decays = losses.index(min(losses)) + 1
    return _gates(inputs, shares, DECAYS[:n_decays])[-1]


def _gates(
    inputs: torch.Tensor, shares: torch.Tensor, decays: Sequence[float]
) -> list[torch.Tensor]:
    """Fit a gate [D+1, E] at every weight decay."""
    scale = inputs.square().mean().sqrt()
    gate = inputs.new_zeros(inputs.shape[1] + 1, shares.shape[1], requires_grad=True)
    path = []
    for decay in decays:
        optimiser = torch.optim.LBFGS(
            [gate], max_iter=GATE_ITERATIONS, line_search_fn="strong_wolfe"
        )

        def loss(decay: float = decay, optimiser: torch.optim.LBFGS = optimiser) -> torch.Tensor:
            optimiser.zero_grad()
            value = _divergence(gate, inputs / scale, shares) + decay * gate[:-1].square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimiser.step(loss)
        path.append(torch.cat([gate.detach()[:-1] / scale, gate.detach()[-1:]]))
    return path


def _divergence(gate: torch.Tensor, inputs: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return the mean divergence, but for the entropy of the shares, which no gate changes."""
    return -(shares * log_softmax(affine(gate, inputs), dim=-1)).sum(dim=-1).mean()


def affine(weights: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Apply a map [D+1, n], its last row the constant, to inputs [T, D]."""
    return torch.addmm(weights[-1], inputs.to(weights.dtype), weights[:-1])


def _recall(scores: torch.Tensor, chosen: torch.Tensor) -> float:
    """Return the share of chosen experts [T, K] among the likeliest K by scores [T, E]."""
    likeliest = scores.topk(chosen.shape[1], dim=-1).indices
    return float((chosen[:, :, None] == likeliest[:, None, :]).any(dim=2).double().mean())
