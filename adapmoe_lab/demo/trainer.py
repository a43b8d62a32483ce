"""The training loop: a tokenised text and a recipe in, a trained model and its loss curve out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapmoe_lab.demo.losses import balance_loss, compute_weights, losses_by_domain, next_token_loss
from adapmoe_lab.demo.recipe import Recipe
from adapmoe_lab.demo.tokens import Mixture, WindowSampler
from adapmoe_lab.models.demo_architecture import (
    DemoModel,
    RoutingTaps,
    residual_dropout,
    routing_taps,
)


@dataclass(frozen=True)
class CurvePoint:
    """One row of the loss curve; losses are in nats per token, without the balance loss."""

    step: int
    seconds: float
    n_tokens: int
    learning_rate: float
    training_loss: float
    development_loss: float


@dataclass(frozen=True)
class TrainingResult:
    """What one run did: its length, how often each domain was read, and its losses."""

    n_steps: int
    n_tokens: int
    seconds: float
    epochs_by_domain: dict[str, float]
    development_loss_by_domain: dict[str, float]
    curve: tuple[CurvePoint, ...]


def train_model(
    model: DemoModel,
    training: Mapping[str, np.ndarray],
    development: Mapping[str, np.ndarray],
    recipe: Recipe,
    report: Callable[[CurvePoint], None],
) -> TrainingResult:
    """Train the model in place, on the device where it lies.

    `training` holds one token stream per domain, int32[T]; `development` the windows,
    int64[N, S + 1], whose loss is reported `n_evaluations` times. On CUDA every forward pass runs
    in bfloat16, as the saved model will, on copies of float32 master weights.
    """
    device = model.device
    streams = torch.from_numpy(np.concatenate(list(training.values()))).to(device)
    sizes = [len(stream) for stream in training.values()]
    mixture = Mixture.by_size(list(training), sizes, recipe.size_exponent)
    sampler = WindowSampler(mixture, recipe.sequence_length, recipe.seed)
    offsets = torch.arange(recipe.sequence_length + 1, device=device)
    optimizer = _optimizer(model, recipe)
    recorder = _CurveRecorder(model, development, recipe.n_evaluations, report)
    start = time.monotonic()
    progress, n_steps = 0.0, 0
    model.train()
    with residual_dropout(model, recipe.dropout), routing_taps(model) as taps:
        while progress < 1.0:
            rate = recipe.learning_rate_at(progress)
            starts = torch.from_numpy(sampler.draw(recipe.batch_sequences)).to(device)
            batch = streams[starts[:, None] + offsets].long()  # [B, S + 1]
            loss = _step(model, optimizer, batch, taps, recipe, rate)
            n_steps += 1
            n_tokens = n_steps * recipe.batch_tokens
            seconds = time.monotonic() - start
            progress = recipe.progress(n_tokens, seconds, streams.numel())
            recorder.add(loss, progress, (n_steps, seconds, n_tokens, rate))
    model.eval()
    return TrainingResult(
        n_steps=n_steps,
        n_tokens=n_steps * recipe.batch_tokens,
        seconds=time.monotonic() - start,
        epochs_by_domain=sampler.epochs(),
        development_loss_by_domain=losses_by_domain(model, development),
        curve=tuple(recorder.points),
    )


class _CurveRecorder:
    """Adds up training losses on the device and turns them into a point now and then."""

    def __init__(
        self,
        model: DemoModel,
        development: Mapping[str, np.ndarray],
        n_points: int,
        report: Callable[[CurvePoint], None],
    ) -> None:
        self.points: list[CurvePoint] = []
        self._model = model
        self._development = development
        self._n_points = n_points
        self._report = report
        self._losses: list[Tensor] = []

    def add(self, loss: Tensor, progress: float, where: tuple[int, float, int, float]) -> None:
        """Take one step's loss; `where` is (step, seconds, tokens, learning rate)."""
        self._losses.append(loss)
        if progress < min(1.0, (len(self.points) + 1) / self._n_points):
            return
        training_loss = torch.stack(self._losses).mean().item()
        self._model.eval()
        by_domain = losses_by_domain(self._model, self._development)
        self._model.train()
        development_loss = float(np.mean(list(by_domain.values()) or [np.nan]))
        self.points.append(CurvePoint(*where, training_loss, development_loss))
        self._losses.clear()
        self._report(self.points[-1])


def _step(
    model: DemoModel,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    taps: RoutingTaps,
    recipe: Recipe,
    learning_rate: float,
) -> Tensor:
    """Take one optimiser step on windows int64[B, S + 1]; return their mean loss, on the device."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss = next_token_loss(model, compute_weights(model), batch).mean()
    balance = balance_loss(list(taps.logits.values()), recipe.architecture.top_k)
    (loss + recipe.balance_weight * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _optimizer(model: DemoModel, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only: norms keep their scale."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    scales = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    on_cuda = model.device.type == "cuda"
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=on_cuda)
