"""Ways to decode that are not this project's: transformers, accelerate, and the published shape."""

from __future__ import annotations

import inspect
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from given_routing import GivenText
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from adapmoe_lab.engine.store.expert_buffer import plain_views
from adapmoe_lab.engine.store.expert_store import ExpertStore
from adapmoe_lab.models.families import MoELayer
from adapmoe_lab.models.hooks.key_value_cache import static_cache

N_REHEARSALS = 3
PUBLISHED_SHAPE = "published_shape"


@contextmanager
def implementation(hf: Any, name: str) -> Iterator[None]:
    """Run a model's experts by another of transformers' implementations."""
    before = hf.config._experts_implementation
    hf.set_experts_implementation(name)
    try:
        yield
    finally:
        hf.set_experts_implementation(before)


class StaticStep:
    """Decodes with a cache of fixed length, compiled, captured, both or neither; a `Decoder`."""

    has_ended = False

    def __init__(
        self, hf: Any, n_tokens: int, backend: str | None = "inductor", is_captured: bool = True
    ) -> None:
        """Begin a sequence of at most `n_tokens`; `backend` compiles the step, None does not."""
        self._hf, self._is_captured = hf, is_captured
        self._step = hf if backend is None else torch.compile(hf, dynamic=False, backend=backend)
        self._cache = static_cache(hf, n_tokens)
        parameters = inspect.signature(type(hf).forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._token = torch.zeros((1, 1), dtype=torch.int64, device=hf.device)
        self._graph: Any = None
        self._n_tokens = 0

    def prefill(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Run a prompt, int64 [T]."""
        self._n_tokens = len(token_ids)
        return self._run(self._hf, token_ids[None].to(self._token.device))

    def step(self, token: int) -> torch.Tensor:
        """Run one token more; return the logits [V] of what follows it."""
        self._token.fill_(token)
        if not self._is_captured:
            return self._run(self._step, self._token)
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._logits

    def _capture(self) -> None:
        present, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(present)
        with torch.cuda.stream(aside):
            for _ in range(N_REHEARSALS):
                self._run(self._step, self._token)
                self._cache.rewind(self._n_tokens)
        present.wait_stream(aside)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._run(self._step, self._token)

    @torch.no_grad()
    def _run(self, forward: Any, token_ids: torch.Tensor) -> torch.Tensor:
        cache = {self._cache_name: self._cache}
        output = forward(input_ids=token_ids, use_cache=True, logits_to_keep=1, **cache)
        return output.logits[0, -1]


class _Leading(LogitsProcessor):
    """Makes generation write a given text, and notes when each of its tokens was asked for."""

    def __init__(self, text: GivenText) -> None:
        self._text = text
        self.times_s: list[float] = []
        self.logits: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        self.times_s.append(time.perf_counter())
        self.logits.append(scores[0].float().clone())
        place = input_ids.shape[1]
        self._text.position.fill_(place)
        led = torch.full_like(scores, -torch.inf)
        led[:, int(self._text.ids[place % len(self._text.ids)])] = 0
        return led


def generate_static(
    hf: Any, text: GivenText, n_prompt: int, n_tokens: int
) -> tuple[list[float], torch.Tensor]:
    """Let `generate` write the text with a cache of `n_tokens`; return seconds and logits [N, V].

    Transformers compiles the step by itself where it sees a GPU. The first of two runs pays for it.
    """
    end = len(text.ids)

    def is_done(input_ids: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        return torch.full((1,), input_ids.shape[1] > end, device=input_ids.device)

    for _ in range(2):
        leading = _Leading(text)
        text.position.zero_()
        hf.generate(
            text.ids[None, :n_prompt].to(hf.device),
            max_new_tokens=n_tokens - n_prompt,
            cache_implementation="static",
            do_sample=False,
            logits_processor=LogitsProcessorList([leading]),
            stopping_criteria=StoppingCriteriaList([is_done]),
            pad_token_id=0,
        )
    times = leading.times_s
    seconds = [after - before for before, after in pairwise(times)]
    text.position.zero_()
    return seconds, torch.stack(leading.logits[1:])


def offload_experts(hf: Any, layers: list[MoELayer], device: torch.device) -> Any:
    """Leave a model's experts to accelerate, on the CPU; the model is spent for anything else."""
    from accelerate import dispatch_model

    main = "cpu" if device.type == "cpu" else device.index or 0
    places: dict[str, Any] = {}
    paths = {layer.path for layer in layers}

    def place(path: str, module: nn.Module) -> None:
        if path in paths:
            module.to("cpu")
            places[path] = "cpu"
        elif any(inner.startswith(f"{path}.") or not path for inner in paths):
            for name, child in module.named_children():
                place(f"{path}.{name}" if path else name, child)
        else:
            places[path] = main

    place("", hf)
    return dispatch_model(hf, device_map=places, main_device=main)


class PublishedShape:
    """How published engines serve experts: the host asks every router and fetches what is missing.

    A cache per layer, the least recently used leaves; copies run on a stream of their own, and each
    expert's products once its copy is done, one expert after the other.

    Experts wait for their copies in the order in which the router names them.
    """

    def __init__(
        self, store: ExpertStore, slots_per_layer: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Begin with empty slots on the device."""
        self._store, layout = store, store.formats[0][0]
        shape = store.n_layers, slots_per_layer, layout.n_bytes
        self._slots = torch.empty(shape, dtype=torch.uint8, device=device)
        self._views = [[plain_views(slot, layout, dtype) for slot in pool] for pool in self._slots]
        self._recency: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(store.n_layers)]
        self._copying = torch.cuda.Stream() if device.type == "cuda" else None
        self._misses = self._n_run = 0

    def counts(self) -> tuple[int, int, int]:
        """Return experts missed, experts run and bytes fetched so far."""
        n_bytes = self._misses * int(self._store.expert_bytes[0, 0])
        return self._misses, self._n_run, n_bytes

    @contextmanager
    def serving(self, hf: Any, layers: list[MoELayer]) -> Iterator[None]:
        """Serve a model's experts."""
        for number, layer in enumerate(layers):
            layer.experts._published = self, number  # pyright: ignore
        try:
            with implementation(hf, PUBLISHED_SHAPE):
                yield
        finally:
            for layer in layers:
                del layer.experts._published

    def run(
        self,
        layer: int,
        experts: Any,
        hidden: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return the summed outputs [T, D], token by token."""
        outputs = []
        for token in zip(hidden.split(1), chosen.tolist(), weights.split(1), strict=True):
            if self._copying is not None and outputs:  # the token before may still read the slots
                self._copying.wait_stream(torch.cuda.current_stream())
            outputs.append(self._run_token(layer, experts, *token))
        return torch.cat(outputs)

    def _run_token(
        self, layer: int, experts: Any, x: torch.Tensor, chosen: list[int], weights: torch.Tensor
    ) -> torch.Tensor:
        recency = self._recency[layer]
        present = [expert for expert in chosen if expert in recency]
        missing = [expert for expert in chosen if expert not in recency]
        arrivals = {expert: self._fetch(layer, expert, chosen) for expert in missing}
        for expert in sorted(chosen):  # of a token's experts the lowest leaves first, as elsewhere
            recency.move_to_end(expert)
        self._misses += len(missing)
        self._n_run += len(chosen)
        output = torch.zeros_like(x, dtype=torch.float32)
        for expert in [*present, *missing]:
            if (arrival := arrivals.get(expert)) is not None:
                torch.cuda.current_stream().wait_event(arrival)
            matrices = self._views[layer][recency[expert]]
            inner = experts._apply_gate(nn.functional.linear(x, matrices["gate_up_proj"]))
            part = nn.functional.linear(inner, matrices["down_proj"])
            output += part * weights[:, chosen.index(expert), None]
        return output.to(x.dtype)

    def _fetch(self, layer: int, expert: int, chosen: list[int]) -> Any:
        """Begin to copy an expert; return what tells that it is done, None if it is.

        The host has waited for this layer's router, so that nothing still reads the slot.
        """
        recency = self._recency[layer]
        if len(recency) < len(self._views[layer]):
            slot = len(recency)
        else:
            slot = recency.pop(next(other for other in recency if other not in chosen))
        recency[expert] = slot
        target, source = self._slots[layer, slot], self._store.buffer(layer, expert)
        if self._copying is None:
            target.copy_(source)
            return None
        with torch.cuda.stream(self._copying):
            target.copy_(source, non_blocking=True)
            return self._copying.record_event()


def _run_published(
    self: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    shape, layer = self._published
    return shape.run(layer, self, hidden, chosen, weights)


ALL_EXPERTS_FUNCTIONS.register(PUBLISHED_SHAPE, _run_published)
