"""Ways to decode, the rows of `decode.py`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from decode_bench import CONTEXT_TOKENS, N_PROMPT, N_TIMED, N_WARM, Bench, Counts, Steps
from given_routing import DISTANCE, PREDICTOR, GivenPredictor, Routing
from stock_decoding import (
    PublishedShape,
    StaticStep,
    generate_static,
    implementation,
    offload_experts,
)

import adapmoe_lab as lab
from adapmoe_lab.engine.host_driven.decoder import TransformersDecoder
from adapmoe_lab.engine.resident_layer import resident_layer_s
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.policies.gating.uniform import UniformCut
from adapmoe_lab.records import PrefetchSource, PrefetchTable, TunedConfig
from adapmoe_lab.records.step_costs import HostCosts, StepCosts

SHARES = (0.5, 1.0, 0.75, 0.25)
N_TIMED_SLOW = 8
SKIPPED_FRACTION = 0.25


def run_graph(bench: Bench, share: float) -> Steps:
    """Replay captured steps."""
    return _replayed(bench, bench.plan_config(share))


def _replayed(bench: Bench, config: TunedConfig) -> Steps:
    bench.served.apply(config)
    steps = bench.run(bench.served.decoder(), bench.served_counts)
    engine = bench.served.engine
    if engine.runs_steps_by != "graph":
        raise RuntimeError(f"Steps are not replayed: {engine.why_not_replayed}.")
    return steps


def run_compiled(bench: Bench, share: float) -> Steps:
    """Replay steps that were compiled before they were captured; all later ones are, too.

    Raises:
        CompileWarning: they could not be.
    """
    from adapmoe_lab.engine.graph.compiling import CompileWarning  # both need triton
    from adapmoe_lab.engine.graph.executor import GraphExecutor

    engine = bench.served.engine
    if not isinstance(engine, GraphExecutor):
        raise RuntimeError(f"Steps are not replayed: {engine.why_not_replayed}.")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileWarning)
        engine.compile_steps()
        return run_graph(bench, share)


def run_host(bench: Bench, share: float) -> Steps:
    """Let the host drive every layer."""
    bench.served.apply(bench.plan_config(share))
    return bench.run(TransformersDecoder(bench.served.hf), bench.served_counts)


def run_adapmoe(bench: Bench, share: float, is_captured: bool) -> Steps:
    """Skip, divide slots and fetch ahead as AdapMoE does; captured steps do not fetch ahead."""
    routing = bench.text.routing
    assert routing is not None, "it is a policy for given routing"  # noqa: S101
    config = adapmoe_config(bench, routing, share, fetches_ahead=not is_captured)
    if is_captured:
        return _replayed(bench, config)
    served, engine = bench.served, bench.served.engine
    bench.text.position.zero_()
    layer_s = resident_layer_s(served.hf, engine, bench.spec.n_layers)
    served.apply(replace(config, prefetch=None))
    predictor = GivenPredictor(bench.text, routing, bench.spec.n_experts)
    costs = StepCosts(HostCosts(dense_layer_s=layer_s))
    engine.configure(
        config.gating, config.plan, prefetch=config.prefetch, predictors=[predictor],
        step_costs=costs,
    )  # fmt: skip
    return bench.run(TransformersDecoder(served.hf), bench.served_counts)


def adapmoe_config(
    bench: Bench, routing: Routing, share: float, fetches_ahead: bool
) -> TunedConfig:
    """Return the policy for a routing: cuts, slots by dynamic programming, predictions."""
    spec, trace = bench.spec, routing.trace(bench.spec)
    gating = UniformCut(trace).table(SKIPPED_FRACTION)
    even = slots_plan(spec, round(share * spec.n_experts))
    accuracy = routing.recall if fetches_ahead else np.zeros(spec.n_layers)
    if spec.top_k == 2:
        is_single = kept_experts(trace, gating).sum(axis=2) == 1
        divided = lab.plan_slots(
            even.n_slots,
            n_experts=spec.n_experts,
            single_expert_ratio=is_single.mean(axis=0),
            prefetch_accuracy=accuracy,
        )
    else:
        curves = lab.miss_curves(trace, gating)
        divided = lab.plan_slots(
            even.n_slots, miss_curves=curves, prefetch_accuracy=accuracy, method="measured"
        )
    plan = replace(even, slots=divided.slots, method=divided.method)
    prefetch = None
    if fetches_ahead:
        probability = np.repeat(accuracy[:, None], spec.top_k, axis=1)
        source = PrefetchSource(PREDICTOR, DISTANCE, probability)
        prefetch = PrefetchTable([source], buffer_slots=min(2 * spec.top_k, spec.n_experts))
    untuned = TunedConfig.untuned(spec)
    return replace(untuned, plan=plan, gating=gating, prefetch=prefetch)


def run_published(bench: Bench, share: float) -> Steps:
    """Fetch by a cache per layer and run expert by expert, see `PublishedShape`."""
    n_slots = round(share * bench.spec.n_experts)
    shape = PublishedShape(bench.served.store, n_slots, torch.bfloat16, bench.device)
    with shape.serving(bench.stock, bench.layers):
        decoder = TransformersDecoder(bench.stock)
        return bench.run(decoder, lambda: Counts(*shape.counts()))


def run_stock(bench: Bench, _: float) -> Steps:
    """Run the unmodified model, all of it on the device."""
    return bench.run(TransformersDecoder(bench.stock))


def run_stock_captured(bench: Bench, _: float, experts: str, is_compiled: bool = True) -> Steps:
    """Capture the unmodified model's step by hand, compiled or not."""
    backend = bench.backend if is_compiled else None
    with implementation(bench.stock, experts):
        is_captured = bench.device.type == "cuda"
        return bench.run(StaticStep(bench.stock, CONTEXT_TOKENS, backend, is_captured))


def run_generate(bench: Bench, _: float) -> Steps:
    """Let transformers' own `generate` do it, with its static cache."""
    seconds, logits = generate_static(bench.stock, bench.text, N_PROMPT, CONTEXT_TOKENS)
    none, n_run = np.zeros(N_TIMED, dtype=np.int64), np.full(N_TIMED, bench.n_chosen)
    return Steps(np.array(seconds[N_WARM:]), none, n_run, none, logits[N_WARM:])


def run_accelerate(bench: Bench, _: float) -> Steps:
    """Leave the experts to accelerate on the CPU, which moves all of a layer's for every token."""
    hf, bench.stock = bench.stock, None
    offloaded = offload_experts(hf, bench.layers, bench.device)
    steps = bench.run(TransformersDecoder(offloaded), n_timed=N_TIMED_SLOW)
    n_moved = np.full(N_TIMED_SLOW, bench.spec.n_layers * bench.spec.n_experts)
    return replace(steps, misses=n_moved, moved_bytes=n_moved * bench.spec.stored_expert_bytes)


GIVEN = ("drawn", "recorded")
EVERY = (*GIVEN, "own")
"""Where routing is from."""


@dataclass(frozen=True)
class Row:
    """A way to decode.

    Attributes:
        run: decodes the text with a share of the experts in slots.
        shares: which shares.
        routings: under which routing, of `EVERY`.
        expected_s: seconds without which it is not begun.
        stage: rows of a lower one come first.
        is_exact: whether its logits are to be the model's.
    """

    run: Callable[[Bench, float], Steps]
    shares: Sequence[float] = (1.0,)
    routings: Sequence[str] = ("drawn",)
    expected_s: float = 10
    stage: int = 1
    is_exact: bool = True


PART = (0.5, 0.75, 0.25)
_captured = partial(partial, run_stock_captured)
_adapmoe = partial(partial, run_adapmoe)
ROWS = {
    "graph": Row(run_graph, SHARES, EVERY, stage=0),
    "adapmoe graph": Row(_adapmoe(is_captured=True), PART, GIVEN, stage=0, is_exact=False),
    "graph compiled": Row(run_compiled, SHARES, EVERY, expected_s=40),
    "stock grouped_mm compiled captured": Row(_captured(experts="grouped_mm"), expected_s=40),
    "host": Row(run_host, SHARES, EVERY),
    "published shape": Row(run_published, SHARES, GIVEN),
    "adapmoe host": Row(_adapmoe(is_captured=False), PART, GIVEN, is_exact=False),
    "stock eager": Row(run_stock),
    "stock batched_mm captured": Row(_captured(experts="batched_mm", is_compiled=False)),
    "stock generate static": Row(run_generate, expected_s=60, stage=2),
    "stock batched_mm compiled captured": Row(
        _captured(experts="batched_mm"), expected_s=40, stage=2
    ),
    "accelerate": Row(run_accelerate, expected_s=60, stage=2),
}
"""By stage and importance: what is compiled comes after what is not, since it stays so, and
`accelerate` is the last, since it spends the model."""
