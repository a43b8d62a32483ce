"""Recording routing while a model runs, in whatever way it is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.layer_pass import LayerPass
from adapmoe_lab.engine.observing import observing
from adapmoe_lab.engine.prefetch.predictors import Predictor, likeliest
from adapmoe_lab.models.families import (
    check_each_runs_once,
    check_scores_known,
    router_scores,
)
from adapmoe_lab.records import Prediction, RoutingTrace
from adapmoe_lab.records.hook_points import HookPoint

Key = tuple[str, int, int]
"""A predictor's name, the distance it looks, and the layer it predicts."""


@dataclass(eq=False)
class _Step:
    """One forward pass: its tokens and, layer by layer, what the routers returned."""

    token_ids: NDArray[np.int64]
    starts_sequence: bool
    layers: list[tuple[NDArray, NDArray, NDArray]] = field(default_factory=list)
    on_device: dict[Key, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    predicted: dict[Key, tuple[NDArray, NDArray]] = field(default_factory=dict)

    def to_host(self) -> None:
        """Bring what was predicted to the host at once, when the device has done it all."""
        for key, (experts, scores) in self.on_device.items():
            self.predicted[key] = experts.short().cpu().numpy(), scores.half().cpu().numpy()
        self.on_device.clear()


class RoutingRecorder:
    """Collects the routing of every forward pass of one model while it is open.

    Also records what predictors predict of it. Batch 1 only, so that no padding is recorded.
    """

    def __init__(
        self,
        model: LabModel,
        predictors: Sequence[Predictor] | None = None,
        n_candidates: int | None = None,
    ) -> None:
        """Prepare to record; `recording` does it.

        Args:
            model: the model that will run.
            predictors: whose predictions are recorded; all that need no fitting if None.
            n_candidates: C, the experts recorded of each prediction; the router's K if None.

        Raises:
            UnsupportedModelError: the routers read something else than the experts, or some layers
                run several times for each token.
        """
        check_each_runs_once(model.layers)
        self._model = model
        self._routers = [layer.router for layer in model.layers]
        for router in self._routers:
            check_scores_known(router)
        self._predictors = model.predictors() if predictors is None else predictors
        self._n_candidates = n_candidates or model.spec.top_k
        self._last_hidden: torch.Tensor | None = None
        self._running: _Step | None = None
        self._steps: list[_Step] = []
        self._skipping = model.engine.skipping

    @contextmanager
    def recording(self) -> Iterator[RoutingRecorder]:
        """Record every forward pass inside the block."""
        self._skipping = self._model.engine.skipping
        callbacks = {
            HookPoint.TOKEN: self._begin_step,
            HookPoint.EXPERTS_INPUT: partial(self._predict, HookPoint.EXPERTS_INPUT),
            HookPoint.EXPERTS_OUTPUT: self._add_layer,
            HookPoint.LAYER_OUTPUT: partial(self._predict, HookPoint.LAYER_OUTPUT),
            HookPoint.LAST_HIDDEN: self._end_step,
        }
        try:
            with observing(self._model, callbacks):
                yield self
        finally:
            self._drop_incomplete()

    def _drop_incomplete(self) -> None:
        self._steps = [s for s in self._steps if len(s.layers) == len(self._routers)]

    def trace(self, labels: Sequence[str] | None = None) -> RoutingTrace:
        """Return what was recorded.

        Args:
            labels: one per sequence; numbered if None.
        """
        if not self._steps:
            raise ValueError("Nothing was recorded: run the model inside `recording()` first.")
        lengths = np.array([len(step.token_ids) for step in self._steps])
        offsets = np.cumsum(lengths) - lengths
        starts = [o for o, s in zip(offsets, self._steps, strict=True) if s.starts_sequence]
        decode_steps = [
            not step.starts_sequence and len(step.token_ids) == 1 for step in self._steps
        ]
        stacked = [
            np.concatenate([np.stack(parts, axis=1) for parts in per_step])
            for per_step in zip(*(self._by_quantity(s) for s in self._steps), strict=True)
        ]
        return RoutingTrace(
            spec=self._model.spec,
            token_ids=np.concatenate([step.token_ids for step in self._steps]),
            expert_indices=stacked[0],
            weights=stacked[1],
            router_probs=stacked[2],
            predictions=self._predictions(),
            sequence_starts=starts,
            step_ids=np.repeat(np.arange(len(self._steps)), lengths),
            is_decode=np.repeat(decode_steps, lengths),
            labels=tuple(labels) if labels else tuple(f"text {i}" for i in range(len(starts))),
            recorded_under=self._skipping,
        )

    @staticmethod
    def _by_quantity(step: _Step) -> tuple[tuple[NDArray, ...], ...]:
        return tuple(zip(*step.layers, strict=True))

    def _predictions(self) -> dict[str, dict[int, Prediction]]:
        pairs = dict.fromkeys(key[:2] for step in self._steps for key in step.predicted)
        predictions: dict[str, dict[int, Prediction]] = {}
        for name, distance in pairs:
            of_steps = [self._predicted(step, name, distance) for step in self._steps]
            experts, scores = (np.concatenate(parts) for parts in zip(*of_steps, strict=True))
            predictions.setdefault(name, {})[distance] = Prediction(experts, scores)
        return predictions

    def _predicted(self, step: _Step, name: str, distance: int) -> tuple[NDArray, NDArray]:
        """Return a step's experts and scores [T, L, C]; the first token of a text may have none."""
        n_candidates = min(self._n_candidates, self._model.spec.n_experts)
        shape = len(step.token_ids), len(self._routers), n_candidates
        experts, scores = np.full(shape, -1, np.int16), np.zeros(shape, np.float16)
        for target in range(len(self._routers)):
            found = step.predicted.get((name, distance, target))
            if found is not None and len(found[0]):
                experts[-len(found[0]) :, target], scores[-len(found[0]) :, target] = found
        return experts, scores

    def _begin_step(self, ids: torch.Tensor, past: Any) -> None:
        if ids.shape[0] != 1:
            raise ValueError(
                f"Routing is recorded one sequence at a time, got a batch of {ids.shape[0]}: "
                "padding is routed too and would be recorded as if it were text."
            )
        is_first = past is None or past.get_seq_length() == 0
        self._running = _Step(ids[0].cpu().numpy(), is_first)
        self._steps.append(self._running)
        self._predict(HookPoint.TOKEN, 0, ids[0])

    def _add_layer(self, layer_pass: LayerPass) -> None:
        router, hidden = self._routers[layer_pass.layer], layer_pass.hidden.detach()
        probabilities = router_scores(router, hidden).cpu().numpy()
        layer = layer_pass.indices.copy(), layer_pass.weights, probabilities
        self._step().layers.append(layer)

    def _end_step(self, last_hidden: torch.Tensor) -> None:
        """Predict from the state of the token before, which is known once that has been run."""
        step, last_hidden = self._step(), last_hidden.float()
        before = [] if step.starts_sequence or self._last_hidden is None else [self._last_hidden]
        self._predict(HookPoint.LAST_HIDDEN, 0, torch.cat([*before, last_hidden[:-1]]))
        self._last_hidden = last_hidden[-1:]
        step.to_host()
        self._running = None

    def _step(self) -> _Step:
        """Return the step that runs now."""
        if self._running is None:
            raise ValueError(
                "Routing is recorded together with its tokens; run the model on token ids, not on "
                "embeddings, and the whole of it."
            )
        return self._running

    @torch.no_grad()
    def _predict(self, hook_point: HookPoint, layer: int, x: torch.Tensor) -> None:
        on_device = self._step().on_device
        for predictor in self._predictors:
            if predictor.hook_point is hook_point:
                for target in predictor.targets(layer):
                    scores = predictor.scores(layer, target, x)
                    key = predictor.name, target - layer, target
                    on_device[key] = likeliest(scores, self._n_candidates)
