"""Text and routing that are given instead of chosen, the same for everything that decodes them.

What a layer's router gives is replaced by tables on the device, read at a position that is on the
device too, so that compiled and captured steps follow them and a table can be exchanged under them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import adapmoe_lab as lab
from adapmoe_lab.records import MoESpec, RoutingTrace
from adapmoe_lab.records.prefetch import HOOK_POINTS

KEEP, RECALL, SEED = 0.6, 0.85, 1
PREDICTOR, DISTANCE = "next_router", 1
FIRST_TOKEN, LAST_TOKEN = 3, 31000


@dataclass(frozen=True, eq=False)
class Routing:
    """What every layer of a text chooses.

    Attributes:
        name: where it is from.
        experts: int64 [T, L, K].
        weights: float32 [T, L, K], summing to one.
        predicted: int64 [T, L, K], what is predicted of each layer at the layer before; -1 for
            none.
    """

    name: str
    experts: NDArray[np.int64]
    weights: NDArray[np.float32]
    predicted: NDArray[np.int64]

    @property
    def recall(self) -> NDArray[np.float64]:
        """Share [L] of the experts of every layer that are predicted."""
        is_predicted = (self.experts[..., None] == self.predicted[:, :, None, :]).any(axis=-1)
        return is_predicted.mean(axis=(0, 2))

    def trace(self, spec: MoESpec) -> RoutingTrace:
        """Return it as a recording of a model, without scores of what was not chosen."""
        n_tokens = len(self.experts)
        return RoutingTrace(
            spec=spec,
            token_ids=np.zeros(n_tokens, dtype=np.int32),
            expert_indices=self.experts.astype(np.int16),
            weights=self.weights,
            router_probs=None,
            predictions={},
            sequence_starts=np.zeros(1, dtype=np.int64),
            step_ids=np.arange(n_tokens),
            is_decode=np.ones(n_tokens, dtype=np.bool_),
            labels=(self.name,),
        )


def drawn_routing(
    n_tokens: int, n_layers: int, n_experts: int, top_k: int, seed: int = SEED
) -> Routing:
    """Draw routing of which each expert stays for the next token with probability `KEEP`.

    What is predicted of a layer holds each of its experts with probability `RECALL`, and others in
    the place of those it lacks. Weights are those of a softmax over normal logits.
    """
    draw, everyone = np.random.default_rng(seed), np.arange(n_experts)

    def filled(first: NDArray[np.int64]) -> NDArray[np.int64]:
        others = np.setdiff1d(everyone, first)
        return np.concatenate([first, draw.permutation(others)[: top_k - len(first)]])

    experts = np.empty((n_tokens, n_layers, top_k), dtype=np.int64)
    predicted = np.empty_like(experts)
    present = [draw.permutation(n_experts)[:top_k] for _ in range(n_layers)]
    for token in range(n_tokens):
        for layer in range(n_layers):
            stays = draw.random(top_k) < KEEP if token else np.ones(top_k, dtype=np.bool_)
            present[layer] = filled(present[layer][stays])
            experts[token, layer] = present[layer]
        for layer in range(n_layers):
            following = (layer + 1) % n_layers
            predicted[token, following] = _mistaken(draw, present[following], n_experts)
    predicted[:, 0] = -1  # nothing comes before the first layer
    logits = np.random.default_rng(seed).standard_normal(experts.shape)
    weights = (np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)).astype(np.float32)
    return Routing(f"drawn, keep {KEEP}, seed {seed}", experts, weights, predicted)


def _mistaken(
    draw: np.random.Generator, right: NDArray[np.int64], n_experts: int
) -> NDArray[np.int64]:
    """Return a prediction of a token's experts [K]: each with probability `RECALL`, and others."""
    known = right[draw.random(len(right)) < RECALL]
    others = draw.permutation(np.setdiff1d(np.arange(n_experts), right))
    return np.resize(np.concatenate([known, others[: len(right) - len(known)]]), len(right))


def recorded_routing(trace: RoutingTrace, n_tokens: int, spec: MoESpec) -> Routing:
    """Return the first tokens of a recording's longest sequence, and of those that follow it.

    A model of more layers than were recorded takes them again, later in the text. Predictions are
    drawn where none were recorded.

    Raises:
        ValueError: it was recorded on another number of experts, or is too short.
    """
    recorded = trace.spec
    if (recorded.n_experts, recorded.top_k) != (spec.n_experts, spec.top_k):
        raise ValueError(
            f"The recording is of {recorded.n_experts} experts, top-{recorded.top_k}; expected "
            f"{spec.n_experts}, top-{spec.top_k}. Give one of a model with as many."
        )
    starts = trace.sequence_starts
    longest = int(np.diff([*starts, trace.n_tokens]).argmax())
    n_rounds = -(-spec.n_layers // recorded.n_layers)
    begins = [int(starts[longest]) + n_tokens * number for number in range(n_rounds)]
    if trace.n_tokens < n_rounds * n_tokens:
        raise ValueError(
            f"The recording has {trace.n_tokens} tokens; {spec.n_layers} layers take "
            f"{n_rounds * n_tokens}. Record a longer text."
        )
    at = (np.arange(n_tokens)[:, None] + np.array(begins)) % trace.n_tokens  # [T, rounds]

    def taken(values: NDArray[Any]) -> NDArray[Any]:
        parts = [values[at[:, number]] for number in range(n_rounds)]
        return np.concatenate(parts, axis=1)[:, : spec.n_layers]

    experts = taken(trace.expert_indices).astype(np.int64)
    by_distance, name = trace.predictions.get(PREDICTOR, {}), f"recorded on {recorded.model_id}"
    predicted = np.full_like(experts, -1)
    if DISTANCE in by_distance:
        found = taken(by_distance[DISTANCE].experts)[:, :, : spec.top_k]
        predicted[:, :, : found.shape[2]] = found
    else:
        draw, name = np.random.default_rng(SEED), f"{name}, predictions drawn"
        for token, layer in np.ndindex(*experts[:, 1:, 0].shape):
            right = experts[token, layer + 1]
            predicted[token, layer + 1] = _mistaken(draw, right, spec.n_experts)
    return Routing(name, experts, taken(trace.shares), predicted)


def demo_recording(texts: Sequence[str]) -> RoutingTrace:
    """Record the demo model's routing of texts, on the CPU."""
    with TemporaryDirectory() as project:
        model = lab.load("demo", device="cpu", dtype="float32", link="none", announce=_hear_nothing)
        with model:
            return lab.profile(model, texts, project=project, reuse=False)


def _hear_nothing(_: str) -> None:
    pass


class GivenText:
    """A text of given tokens, and the routing in force.

    Attributes:
        ids: int64 [T] on the host.
        position: int64 [1] on the device, of the first token of the pass that runs.
        routing: the routing in force; None to let the routers choose.
    """

    def __init__(self, spec: MoESpec, n_tokens: int, device: torch.device) -> None:
        """Draw the tokens; the routers choose until `use` is called."""
        generator = torch.Generator().manual_seed(SEED)
        self.ids = torch.randint(FIRST_TOKEN, LAST_TOKEN, (n_tokens,), generator=generator)
        # twice, so that what runs past the end of the text finds routing too
        shape = spec.n_layers, 2 * n_tokens, spec.top_k
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self._experts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._weights = torch.zeros(shape, dtype=torch.float32, device=device)
        self._is_given = torch.zeros(1, dtype=torch.bool, device=device)
        self.routing: Routing | None = None
        for table in (self.position, self._experts, self._weights, self._is_given):
            torch._dynamo.mark_static_address(table)

    def use(self, routing: Routing | None) -> None:
        """Put a routing in force, in compiled and captured steps too."""
        self.routing = routing
        self._is_given.fill_(routing is not None)
        if routing is not None:
            tables = ((self._experts, routing.experts), (self._weights, routing.weights))
            for table, values in tables:
                table.copy_(torch.from_numpy(np.concatenate([values, values])).transpose(0, 1))

    @contextmanager
    def leading(self, routers: Sequence[nn.Module]) -> Iterator[None]:
        """Lead the routers of a model, one per layer, which do all of their work beside it."""
        with ExitStack() as hooks:
            for layer, router in enumerate(routers):
                handle = router.register_forward_hook(self._leader(layer))
                hooks.callback(handle.remove)
            yield

    def _leader(self, layer: int) -> Any:
        def lead(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            logits, weights, chosen = output
            places = self.position + torch.arange(len(chosen), device=chosen.device)
            given = self._experts[layer].index_select(0, places).to(chosen.dtype)
            given_weights = self._weights[layer].index_select(0, places).to(weights.dtype)
            return (
                logits,
                torch.where(self._is_given, given_weights, weights),
                torch.where(self._is_given, given, chosen),
            )

        return lead


class GivenPredictor:
    """Predicts what a routing says is predicted; a `Predictor`."""

    name = PREDICTOR
    hook_point = HOOK_POINTS[name]

    def __init__(self, text: GivenText, routing: Routing, n_experts: int) -> None:
        """Score the experts that are predicted, the first best, and no others."""
        predicted = torch.from_numpy(routing.predicted)
        top_k = predicted.shape[-1]
        scores = torch.zeros((*predicted.shape[:2], n_experts + 1))
        ranks = torch.arange(top_k, 0, -1).expand_as(predicted).float()
        scores.scatter_(2, predicted % (n_experts + 1), ranks)  # -1 is the last
        self._scores = scores[..., :n_experts].repeat(2, 1, 1).to(text.position.device)
        self._position = text.position

    def targets(self, layer: int) -> range:
        """Return the next layer."""
        return range(layer + 1, min(layer + 2, self._scores.shape[1]))

    def scores(self, source: int, target: int, x: torch.Tensor) -> torch.Tensor:
        """Return the scores [T, E] of the target layer at the present position."""
        places = self._position + torch.arange(len(x), device=x.device)
        return self._scores[:, target].index_select(0, places)
