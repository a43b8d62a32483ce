"""Latency runs: what is sampled, what is left out, what they refuse."""

import numpy as np
import pytest
from runs import PROMPT, half_cached

from adapmoe_lab.engine.clock import VirtualClock
from adapmoe_lab.evaluation.latency import measure_latency

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


def test_accuracy_and_latency_runs_keep_the_same_experts(load_tiny):
    from adapmoe_lab.evaluation.loss import evaluate_loss
    from adapmoe_lab.records import GatingTable, TunedConfig

    model = load_tiny()
    config = TunedConfig(
        model=TunedConfig.model_identity(model.spec),
        gating=GatingTable.per_layer([0.7] * 3, 2),
    )
    latency = measure_latency(model, config, [PROMPT], new_tokens=2, repeats=1)
    loss = evaluate_loss(model, config, [PROMPT])
    assert latency.prefill_traffic.skipped_fraction == pytest.approx(
        loss.skipped_fraction, abs=0.05
    )
    assert latency.prefill_traffic.skipped_fraction > 0


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
        ({"new_tokens": 1}, "new_tokens of at least 2"),
        ({"repeats": 0}, "at least one repeat"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [""]}, "none of them empty"),
    ],
)
def test_what_it_refuses(load_tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        measure_latency(load_tiny(), **{"prompts": [PROMPT], **arguments})


def test_unlike_conditions_are_not_compared(load_tiny):
    model = load_tiny()
    wide = measure_latency(model, None, [PROMPT], new_tokens=4, repeats=1)
    narrow = measure_latency(half_cached(model), None, [PROMPT], new_tokens=4, repeats=1)
    with pytest.raises(ValueError, match="unlike conditions"):
        wide.decode.ratio_to(narrow.decode)
    assert np.isfinite(wide.decode.ratio_to(narrow.decode, varied=("slots",)))
