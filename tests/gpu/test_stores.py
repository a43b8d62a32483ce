"""Packed, prepared and disk-bound experts on a real GPU."""

import pytest
import torch
from runs import decode

from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.store.expert_store import DiskStore
from adapmoe_lab.records.files import CACHE_VARIABLE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

PROMPT = "Once upon a time there was a little girl"


def loaded(**arguments):
    return load("demo", device="cuda", dtype="float32", **arguments)


@torch.no_grad()
def logits(model):
    return model.hf(model.encode(PROMPT)[None].to(model.hf.device)).logits.cpu()


@pytest.mark.parametrize("precision", ["int8", "int4", "int3", "int2", "mxfp4"])
def test_packed_experts_equal_those_on_the_cpu(precision):
    on_cpu = load("demo", device="cpu", dtype="float32", expert_dtype=precision, link="none")
    on_gpu = loaded(expert_dtype=precision, expert_memory="50%")
    for number in on_cpu.store.numbers():
        cpu, gpu = (model.store.buffer(*number).float() for model in (on_cpu, on_gpu))
        assert (cpu != gpu).float().mean() < 0.01, "packing differs by more than rounding"
    torch.testing.assert_close(logits(on_gpu), logits(on_cpu), rtol=0.02, atol=0.05)
    short = on_gpu.encode(PROMPT)
    assert decode(on_gpu.hf, short, 8) == decode(on_gpu.hf, short, 8)


def test_the_disk_tier_is_exact(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    expected = logits(loaded())
    model = loaded(host_memory="10MiB", expert_memory="50%")
    assert isinstance(model.store, DiskStore)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_a_prepared_store_is_exact_and_pinned(tmp_path):
    expected = logits(loaded(expert_dtype="int4"))
    loaded(expert_dtype="int4", store=tmp_path / "experts")
    model = loaded(store=tmp_path / "experts", expert_memory="50%")
    assert model.store.buffer(0, 0).is_pinned()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_closing_unpins(tmp_path):
    model = loaded()
    row = model.store.buffer(0, 0)
    assert row.is_pinned()
    model.store.close()
    assert not row.is_pinned()


def test_peak_device_memory_is_what_was_planned():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = loaded(expert_memory="40%", max_context_tokens=512)
    decode(model.hf, torch.arange(448), 64)
    plan = model.memory
    planned = plan.needs.total + plan.slot_bytes
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * planned
