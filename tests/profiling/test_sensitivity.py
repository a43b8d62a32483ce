"""Fisher information and the second-order estimate against finite differences and ablation."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from adapmoe_lab.evaluation.loss import evaluate_loss
from adapmoe_lab.profiling.sensitivity import sensitivity
from adapmoe_lab.records import GatingTable, TunedConfig

TEXT = "abc def"


def finite_difference_fisher(checkpoint, ids, step=3e-3):
    """Return mean over tokens of ||dL/dy_l||^2 [L], one central difference per output value.

    The norms of transformers compute in float32 whatever the model's dtype: a smaller step would
    measure their rounding.
    """
    hf = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    hf.set_experts_implementation("eager")
    n_layers, width = len(hf.model.layers), hf.config.hidden_size
    nudge = torch.zeros(len(ids), width, dtype=torch.float64)
    where = {"layer": -1}
    for number, layer in enumerate(hf.model.layers):

        def add(_, __, output, number=number):
            return output + nudge.view_as(output) if where["layer"] == number else output

        layer.mlp.experts.register_forward_hook(add)

    @torch.no_grad()
    def loss():
        logits = hf(ids[None]).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))

    squares = np.zeros(n_layers)
    for layer in range(n_layers):
        where["layer"] = layer
        for token in range(len(ids)):
            for channel in range(width):
                nudge[token, channel] = step
                above = loss()
                nudge[token, channel] = -step
                squares[layer] += ((above - loss()) / (2 * step)) ** 2
                nudge[token, channel] = 0
    return squares / len(ids)


def test_fisher_equals_finite_differences(tiny_checkpoint, load_tiny):
    model = load_tiny()
    profile = sensitivity(model, [TEXT], calibrate=False)
    expected = finite_difference_fisher(tiny_checkpoint, model.encode(TEXT))
    np.testing.assert_allclose(profile.cost, expected, rtol=1e-3)
    assert profile.n_tokens == len(TEXT)


def test_cache_and_gating_play_no_part(load_tiny, texts):
    model = load_tiny()
    expected = sensitivity(model, texts, calibrate=False)
    model.apply(TunedConfig(
        model=TunedConfig.model_identity(model.spec),
        gating=GatingTable.per_layer([0.6] * 3, 2),
    ))  # fmt: skip
    again = sensitivity(model, texts, calibrate=False)
    np.testing.assert_allclose(again.cost, expected.cost, rtol=1e-6)
    assert model.config.gating is not None


def test_standard_errors_are_over_sequences(load_tiny, texts):
    model = load_tiny()
    whole = sensitivity(model, texts, calibrate=False)
    parts = [sensitivity(model, [text], calibrate=False) for text in texts]
    n_tokens = np.array([part.n_tokens for part in parts])
    costs = np.array([part.cost for part in parts])
    np.testing.assert_allclose(whole.cost, (n_tokens @ costs) / n_tokens.sum(), rtol=1e-6)
    weights = n_tokens / n_tokens.sum()
    variance = (weights[:, None] ** 2 * (costs - whole.cost) ** 2).sum(0) * 3 / 2
    np.testing.assert_allclose(whole.standard_error, np.sqrt(variance), rtol=1e-6)
    assert np.isnan(parts[0].standard_error).all()


def test_calibration_anchors_the_estimate_to_a_measured_increase(load_tiny, texts):
    model = load_tiny()
    profile = sensitivity(model, texts)
    raw = sensitivity(model, texts, calibrate=False)
    assert raw.scale == 1.0
    assert profile.scale > 0
    assert profile.scale != 1.0
    assert 0 < profile.scale_se < profile.scale
    np.testing.assert_allclose(profile.increase_nats, raw.increase_nats)
    off = np.full(3, 2.0)
    assert profile.increase(off)[0].sum() == 0
    assert (raw.increase(np.full(3, 0.6))[0] >= raw.increase(np.full(3, 0.9))[0]).all()


def test_what_a_text_must_have(load_tiny):
    with pytest.raises(ValueError, match="at least two tokens each; text 0 is shorter"):
        sensitivity(load_tiny(), ["a"])


def test_loss_equals_the_unmodified_model(tiny_checkpoint, load_tiny, texts):
    model, plain = load_tiny(), AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    report = evaluate_loss(model, None, texts)
    for text, nats in zip(texts, report.nats, strict=True):
        ids = model.encode(text)[None]
        with torch.no_grad():
            mean = float(plain(ids, labels=ids).loss)
        assert nats == pytest.approx(mean * (ids.shape[1] - 1), rel=1e-5)
    assert report.skipped_fraction == 0.0
