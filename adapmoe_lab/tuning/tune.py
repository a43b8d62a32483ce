"""From trace, sensitivity and hardware to a tuned configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.loss import evaluate_loss
from adapmoe_lab.evaluation.texts import Texts, as_texts
from adapmoe_lab.policies.allocation.slots import budget_bytes, uniform_plan
from adapmoe_lab.policies.gating.registry import RULES, check_method, largest_skipped_fraction
from adapmoe_lab.policies.gating.rule import Rule, check_skipped_fraction
from adapmoe_lab.records import (
    HardwareProfile,
    MoESpec,
    Predictors,
    RoutingTrace,
    SensitivityProfile,
    Surrogates,
    TunedConfig,
)
from adapmoe_lab.records.arguments import finite_number
from adapmoe_lab.records.prefetch import buffer_bytes
from adapmoe_lab.simulation.search.cache_search import CacheChoice, best_cache
from adapmoe_lab.simulation.search.prefetch_search import (
    NO_SOURCES,
    best_prefetch,
    buffer_slots,
    ms_per_token,
)
from adapmoe_lab.simulation.simulate import Simulation, simulate

MAX_STEPS_BACK = 4
MIN_PREFETCH_GAIN = 0.01
"""Share of the predicted time that prefetching must save to be taken."""

BFLOAT16_BYTES = 2
"""Of a number of the surrogates, where no model says what it computes in."""


def tune(
    trace: RoutingTrace,
    sensitivity: SensitivityProfile,
    hardware: HardwareProfile | None = None,
    *,
    expert_memory: str | int | None = "50%",
    skipped_fraction: float | None = None,
    max_loss_increase_nats: float = 0.01,
    method: str = "uniform",
    compensation: Surrogates | None = None,
    prefetch: bool = True,
    predictors: Predictors | None = None,
    model: LabModel | None = None,
    texts: Texts | None = None,
) -> TunedConfig:
    """Choose cuts, slots and eviction for a memory budget.

    Slots are divided, and the eviction chosen, by what loads least in a replay of the trace. With a
    model the loss increase is measured too, and where the fraction was left open less is
    skipped until the measurement keeps what was allowed.

    Args:
        trace: recorded routing of the model, ungated.
        sensitivity: what skipping costs, of the same model.
        hardware: measured times; without it no latency is predicted.
        expert_memory: room for experts on the device, see `policies.allocation.budget_bytes`.
        skipped_fraction: share of expert activations to skip; if None, the largest whose
            predicted loss increase stays within `max_loss_increase_nats`.
        max_loss_increase_nats: allowed predicted loss increase per token.
        method: `"uniform"` (one cut for all layers), `"adapmoe"` (its sensitivity rule) or
            `"curve"` (least predicted loss).
        compensation: surrogates of skipped experts; the sensitivity must be measured with it,
            and its bytes come out of `expert_memory`.
        prefetch: whether to prefetch if that is predicted to be faster, with its buffer out of
            `expert_memory`; needs hardware, and a trace with predictions.
        predictors: fitted predictors whose predictions the trace has.
        model: the model to verify the loss on; without it the config is only predicted.
        texts: what to verify on, best other texts than the trace and the sensitivity are from;
            the shipped calibration texts if None.

    Returns:
        The config, with what it is predicted (and measured) to do as evidence.

    Raises:
        ValueError: the method is unknown, trace and sensitivity are of different models, the router
            chooses a single expert, the trace was recorded while experts were skipped, or an
            argument is out of range.
    """
    _check(trace, sensitivity, method, skipped_fraction, max_loss_increase_nats)
    texts = as_texts(texts) if texts is not None else None
    budget = budget_bytes(expert_memory, trace.spec)
    beside = _surrogate_bytes(compensation, model)
    plan = uniform_plan(trace.spec, budget, beside_bytes=beside)
    rule = RULES[method](trace, sensitivity)
    ungated = replace(
        TunedConfig.untuned(trace.spec),
        compensation=compensation,
        plan=plan,
        precision=trace.spec.precision,
        hardware=hardware,
    )
    allowed = None
    if skipped_fraction is None:
        allowed = max_loss_increase_nats
        skipped_fraction = largest_skipped_fraction(rule, sensitivity, trace.spec.top_k, allowed)
    skipping = partial(_skipping, ungated, rule)
    config, measured = skipping(skipped_fraction), None
    if model is not None:
        config, measured = _verified(skipping, skipped_fraction, allowed, model, texts)
    chosen, tried = best_cache(trace, plan, config.gating)
    config = replace(config, plan=chosen.plan, eviction=chosen.eviction)
    times = None
    if prefetch and hardware is not None:
        config, times = _prefetching(trace, config, hardware, predictors, budget, beside)
    return config.with_evidence(
        method=method,
        residency=cache_summary(chosen, tried),
        prefetch=times,
        trace=trace.fingerprint(),
        verified=measured is not None,
        measured=measured,
        **_predicted(trace, config, hardware, sensitivity),
    )


def _check(
    trace: RoutingTrace,
    sensitivity: SensitivityProfile,
    method: str,
    skipped_fraction: float | None,
    max_loss_increase_nats: float,
) -> None:
    """Refuse what cannot be tuned by; see `tune`."""
    check_method(method)
    sensitivity.check_model(trace.spec)
    check_skippable(trace.spec)
    trace.check_ungated()
    if skipped_fraction is not None:
        check_skipped_fraction(skipped_fraction, trace.spec.top_k)
    finite_number("max_loss_increase_nats", max_loss_increase_nats, at_least=0)


def _surrogate_bytes(surrogates: Surrogates | None, model: LabModel | None) -> int:
    """Return the device bytes of surrogates, in the precision that the model computes in."""
    item_bytes = model.hf.dtype.itemsize if model is not None else BFLOAT16_BYTES
    return surrogates.n_bytes(item_bytes) if surrogates is not None else 0


def _predicted(
    trace: RoutingTrace,
    config: TunedConfig,
    hardware: HardwareProfile | None,
    sensitivity: SensitivityProfile,
) -> dict[str, dict[str, Any]]:
    """Return what a config is predicted to do, with its skipping and without."""
    configs = {"predicted": config, "predicted_without_skipping": replace(config, gating=None)}
    return {
        name: prediction_summary(simulate(trace, one, hardware, sensitivity=sensitivity))
        for name, one in configs.items()
    }


def _skipping(ungated: TunedConfig, rule: Rule, fraction: float) -> TunedConfig:
    """Return a config that skips so much, where a rule says."""
    return replace(ungated, gating=rule.table(fraction) if fraction > 0 else None)


def _prefetching(
    trace: RoutingTrace,
    config: TunedConfig,
    hardware: HardwareProfile,
    predictors: Predictors | None,
    budget: int,
    surrogate_bytes: int,
) -> tuple[TunedConfig, dict[str, float] | None]:
    """Return the config with the prefetch that pays, if any, and milliseconds by what was tried.

    The buffer takes slots away, so that the times compared are of the same memory.
    """
    spec = trace.spec
    n_bytes = buffer_bytes(buffer_slots(spec), spec.stored_expert_bytes, predictors)
    try:
        plan = uniform_plan(spec, budget, beside_bytes=surrogate_bytes + n_bytes)
    except ValueError:  # no room for a buffer
        return config, None
    chosen, _ = best_cache(trace, plan, config.gating)
    beside = replace(config, plan=chosen.plan, eviction=chosen.eviction)
    table, times = best_prefetch(trace, beside, hardware, fitted=predictors)
    times[NO_SOURCES] = ms_per_token(simulate(trace, config, hardware))
    if table is None or min(times.values()) > (1 - MIN_PREFETCH_GAIN) * times[NO_SOURCES]:
        return config, times
    return replace(beside, prefetch=table), times


def _verified(
    skipping: Callable[[float], TunedConfig],
    fraction: float,
    allowed: float | None,
    model: LabModel,
    texts: Sequence[str] | None,
) -> tuple[TunedConfig, dict[str, Any]]:
    """Return the config whose measured loss increase is allowed, and the measurement.

    The loss grows about with the square of what is skipped, so each step back follows a square
    root; after `MAX_STEPS_BACK` of them nothing is skipped.
    """
    baseline = evaluate_loss(model, TunedConfig.untuned(model.spec), texts)
    for step in range(MAX_STEPS_BACK + 1):
        config = skipping(fraction if step < MAX_STEPS_BACK else 0.0)
        report = evaluate_loss(model, config, texts)
        increase, error = report.increase_over(baseline)
        if allowed is None or increase <= allowed:
            break
        fraction *= 0.95 * (max(allowed, 0.0) / increase) ** 0.5
    return config, {
        "loss_increase_nats": increase,
        "loss_increase_se": error,
        "skipped_fraction": report.skipped_fraction,
        "n_tokens": int(report.n_predicted.sum()),
        "texts": report.texts,
    }


def check_skippable(spec: MoESpec) -> None:
    """Raise ValueError if the router chooses a single expert, so that none can be skipped."""
    if spec.top_k < 2:
        raise ValueError(
            f"{spec.model_id} routes every token to one expert, so none can be skipped; tuning "
            "needs a model whose router chooses two or more."
        )


def cache_summary(chosen: CacheChoice, tried: Sequence[CacheChoice]) -> dict[str, Any]:
    """Return which cache was chosen, and the loads of all that were tried, as JSON values."""
    return {
        "slots": chosen.division,
        "eviction": chosen.eviction,
        "loads_per_token": {f"{r.division}, {r.eviction}": r.loads_per_token for r in tried},
    }


def prediction_summary(simulation: Simulation) -> dict[str, Any]:
    """Return a simulation's headline numbers as plain JSON values."""
    return {
        "experts_per_token": simulation.mean_experts_per_token,
        "skipped_fraction": simulation.skipped_fraction,
        "hit_rate": simulation.mean_hit_rate,
        "bytes_per_token": simulation.bytes_per_token,
        "ms_per_token": simulation.ms_per_token,
        "loss_increase_nats": simulation.loss_increase_nats,
        "loss_increase_se": simulation.loss_increase_se,
    }
