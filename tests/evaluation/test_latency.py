"""Latency runs: what is sampled, what is left out, what they refuse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import PROMPT, decode, half_cached

from adapmoe_lab.engine.observing import observing
from adapmoe_lab.engine.transfer.clock import VirtualClock
from adapmoe_lab.evaluation.latency import measure_latency
from adapmoe_lab.evaluation.loss import evaluate_loss
from adapmoe_lab.policies.gating.keep import fixed_k, score_ratio
from adapmoe_lab.records import GatingTable, IncomparableError, TunedConfig
from adapmoe_lab.records.hook_points import HookPoint

PROMPTS = [PROMPT, "def f(x):"]


def test_prefill_apart_from_decode_and_warm_up_left_out(load_tiny):
    model = half_cached(load_tiny())
    report = measure_latency(model, None, PROMPTS, new_tokens=6, repeats=3)
    assert len(report.prefill.samples) == 2 * 3
    assert len(report.decode.samples) == 2 * 3
    steps = report.decode_steps.samples.reshape(6, 5)
    np.testing.assert_allclose(report.decode.samples, steps.mean(axis=1))
    assert report.decode_traffic.n_steps == len(report.decode_steps.samples)
    asked = report.decode_traffic.hits + report.decode_traffic.misses
    assert (asked == report.decode_traffic.n_steps * 2).all()
    moved = report.decode_traffic.misses.sum() * model.spec.stored_expert_bytes
    assert report.decode_traffic.bytes_moved == moved
    low, high = report.decode.spread
    assert 0 < low <= report.decode.median <= high


@pytest.mark.parametrize(
    "gating",
    [
        GatingTable.per_layer([0.7] * 3, 2),
        GatingTable.per_layer([0.6, 0.8, 0.7], 2, renormalise=True),
        score_ratio(3, 2, 0.4),
        fixed_k(2, [1, 2, 1]),
    ],
    ids=["cuts", "renormalised", "score-ratio", "fixed-k"],
)
def test_accuracy_and_latency_runs_keep_the_same_experts(load_tiny, gating):
    """Prefill, decode and loss: the same token keeps the same experts in every layer."""
    model = half_cached(load_tiny())
    config = replace(model.config, gating=gating)
    ids, n_new = model.encode(PROMPT), 5

    def kept_by(run):
        """Return indices and keep of every layer, tokens in the order they were run."""
        passes = [[], [], []]
        callbacks = {HookPoint.EXPERTS_OUTPUT: lambda p: passes[p.layer].append(p)}
        with model.running(config), observing(model, callbacks):
            run()
        return [
            [np.concatenate([getattr(p, name) for p in layer]) for name in ("indices", "keep")]
            for layer in passes
        ]

    with model.running(config):
        produced = decode(model.hf, ids, n_new)
    whole = torch.cat([ids, torch.tensor(produced[:-1])])  # the last token is not run again
    latency = kept_by(
        lambda: measure_latency(
            model, config, [PROMPT], new_tokens=n_new, repeats=1, max_prompt_tokens=len(ids)
        )
    )
    loss = kept_by(lambda: evaluate_loss(model, config, [PROMPT]))
    with torch.no_grad():
        at_once = kept_by(lambda: model.hf(whole[None]))
    for layer in range(3):
        for in_latency, in_loss, in_one in zip(
            latency[layer], loss[layer], at_once[layer], strict=True
        ):
            warm_up, run = np.split(in_latency, 2)
            np.testing.assert_array_equal(warm_up, run)
            np.testing.assert_array_equal(run, in_one)
            np.testing.assert_array_equal(run[: len(ids)], in_loss)
        assert not latency[layer][1].all() or gating.cuts[layer].min() > 1


def test_progress_counts_up_and_may_stop_the_run(load_tiny):
    model = half_cached(load_tiny())
    before, seen = model.config, []

    def stop_at_ten(done, total, _):
        seen.append((done, total))
        if done == 10:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        measure_latency(model, None, PROMPTS, new_tokens=6, progress=stop_at_ten)
    assert seen == [(i, 7 * 6) for i in range(1, 11)]
    assert model.config is before


def test_disturbed_runs_are_taken_again(load_tiny):
    model = half_cached(load_tiny(clock=VirtualClock()))
    disturbances = iter([False, True, True, False, False])
    report = measure_latency(
        model, None, [PROMPT], new_tokens=4, repeats=2, was_disturbed=lambda: next(disturbances)
    )
    assert len(report.prefill.samples) == 2
    assert next(disturbances, None) is None


def test_a_run_that_is_always_disturbed_gives_up(load_tiny):
    with pytest.raises(
        RuntimeError, match=r"disturbed .* times in a row; leave the controls alone"
    ):
        measure_latency(load_tiny(), None, [PROMPT], new_tokens=4, was_disturbed=lambda: True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new_tokens": 1}, "new_tokens must be a whole number of at least 2, got 1"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1, got 0"),
        ({"repeats": 1.5}, "repeats must be a whole number of at least 1, got 1.5"),
        ({"max_prompt_tokens": -3}, "max_prompt_tokens must be a whole number of at least 1"),
        ({"prompts": [PROMPT, 5]}, r"prompts\[1\] must be one string, got 5"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [""]}, "none of them empty"),
    ],
)
def test_what_it_refuses(load_tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        measure_latency(load_tiny(), **{"prompts": [PROMPT], **arguments})


def measured(model, config=None):
    return measure_latency(model, config, [PROMPT], new_tokens=4, repeats=1).decode


def assert_only_differ_in(name, one, other):
    with pytest.raises(IncomparableError, match=rf"unlike conditions \({name}: [^;]*\)"):
        one.ratio_to(other)
    assert np.isfinite(one.ratio_to(other, varied=(name,)))


def test_configs_that_run_otherwise_are_not_compared(load_tiny):
    model = load_tiny()
    wide, half = measured(model), half_cached(model).config
    narrow = measured(model, half)
    assert_only_differ_in("plan", wide, narrow)
    assert_only_differ_in("eviction", narrow, measured(model, replace(half, eviction="lfu")))
    gating = GatingTable.per_layer([0.7] * 3, 2)
    assert_only_differ_in("gating", narrow, measured(model, replace(half, gating=gating)))
    pins = [
        replace(half, plan=replace(half.plan, pinned=((first, 3),) * 3), eviction="static")
        for first in (0, 1)
    ]
    assert_only_differ_in("plan", *(measured(model, config) for config in pins))
    assert measured(model, half).ratio_to(narrow) > 0


def test_what_a_config_leaves_open_is_what_the_model_was_loaded_with(load_tiny):
    wide, narrow = (load_tiny(expert_memory=size) for size in ("100%", "60%"))
    untuned = TunedConfig.untuned(wide.spec)
    assert_only_differ_in("plan", measured(wide, untuned), measured(narrow, untuned))
    planned = replace(untuned, plan=narrow.memory.slots, precision=narrow.spec.precision)
    assert measured(narrow, planned).ratio_to(measured(narrow, untuned)) > 0


def test_times_in_other_precisions_are_not_compared(load_tiny):
    mixed = [["int8", "int4", "int8", "int8"]] * 3
    layouts = [mixed, [layer[::-1] for layer in mixed]]
    one, other = (measured(load_tiny(expert_dtype=names, dtype="float32")) for names in layouts)
    assert_only_differ_in("precision", one, other)
    whole, half = (
        measured(load_tiny(expert_dtype="int8", dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    expected = "compute_dtype: 'float32' against 'bfloat16'"
    with pytest.raises(IncomparableError, match=expected):
        whole.ratio_to(half)
