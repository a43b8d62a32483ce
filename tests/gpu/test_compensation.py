"""Surrogates on a real GPU: the same answers as on the CPU, without waiting for the device."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn_surrogates import random_surrogates
from torch.cuda import get_sync_debug_mode, set_sync_debug_mode

import adapmoe_lab as lab
from adapmoe_lab.engine.loading import load
from adapmoe_lab.records import GatingTable, TunedConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

PROMPT = "Once upon a time there was a little girl who lived with her brother in the woods."


def on(device, **arguments):
    link = None if device == "cuda" else "none"
    return load("demo", device=device, dtype="float32", link=link, **arguments)


def compensated(model, surrogates):
    gating = GatingTable.per_layer([0.7] * model.spec.n_layers, model.spec.top_k)
    return replace(TunedConfig.untuned(model.spec), gating=gating, compensation=surrogates)


@torch.no_grad()
def logits(model):
    return model.hf(model.encode(PROMPT)[None].to(model.engine.device)).logits.cpu()


def test_compensated_output_equals_that_on_the_cpu():
    models = on("cuda"), on("cpu")
    for model in models:
        model.apply(compensated(model, random_surrogates(model.spec, ranks=[0, 3] * 4)))
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("n_tokens", [1, 7])
def test_the_device_is_not_waited_for(n_tokens):
    model = on("cuda")
    model.apply(compensated(model, random_surrogates(model.spec)))
    rng = np.random.default_rng(0)
    routing = np.tile([1, 5], (n_tokens, 1)), rng.uniform(0.1, 1, (n_tokens, 2)).astype("float32")
    keep = np.zeros((n_tokens, 2), dtype=bool)
    keep[:, 0] = True
    hidden = torch.randn(n_tokens, model.spec.hidden_size, device="cuda")
    before = get_sync_debug_mode()
    set_sync_debug_mode("error")
    try:
        output = model.engine._skipping.outputs.complete(2, hidden, hidden, routing, keep)
    finally:
        set_sync_debug_mode(before)
    assert output.isfinite().all()


@pytest.mark.parametrize("gradient_weighted", [False, True])
def test_a_fit_equals_that_on_the_cpu(gradient_weighted):
    texts = lab.calibration_texts()[:6]
    how = {"rank": 8, "gradient_weighted": gradient_weighted, "max_tokens": 200}
    gpu, cpu = (
        lab.fit_surrogates(model, texts, **how)
        for model in (on("cuda", expert_memory="40%"), on("cpu"))
    )
    np.testing.assert_allclose(gpu.gain, cpu.gain, atol=0.01)
    for layer in range(gpu.n_layers):
        products = [one.up[layer] @ one.down[layer] for one in (gpu, cpu)]
        difference = np.linalg.norm(products[0] - products[1]) / np.linalg.norm(products[1])
        assert difference < 0.02


def test_surrogates_are_part_of_the_planned_memory(tmp_path):
    model = on("cuda", expert_memory="40%")
    path = compensated(model, random_surrogates(model.spec, ranks=[32] * 8)).save(
        tmp_path / "c.json"
    )
    del model
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    again = on("cuda", config=path)
    plan = again.memory
    assert plan.surrogate_bytes == again.config.compensation.n_bytes(4)
    planned = plan.needs.weights + plan.slot_bytes + plan.surrogate_bytes
    assert torch.cuda.memory_allocated() - before <= 1.1 * planned
