"""The memory plan: the numbers it gives are those that are then taken."""

import re
from dataclasses import replace

import pytest
import torch

from adapmoe_lab.engine import memory_plan as memory
from adapmoe_lab.engine.host_driven import executor as offload
from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.memory_plan import memory_needs, plan_memory
from adapmoe_lab.models.checkpoint.checkpoint import look_at_model
from adapmoe_lab.models.checkpoint.meta_model import describe
from adapmoe_lab.policies.allocation.slots import N_STAGING, slots_plan
from adapmoe_lab.records import GatingTable, TunedConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MIB = 2**20


@pytest.fixture
def meta_model():
    return look_at_model("demo")


@pytest.fixture
def plan(meta_model, monkeypatch):
    """Return a planner for the demo (48 MiB of experts in float32) with so many MiB free."""
    formats = [[meta_model.expert_format(layer, "float32")] * 8 for layer in range(8)]
    spec = describe(meta_model, formats)
    needs = memory_needs(meta_model, spec.top_k, CPU, 256)

    def plan_with(device, device_mib, host_mib=10_000, **arguments):
        monkeypatch.setattr(memory, "_free_bytes", lambda _: device_mib * MIB)
        host = type("Memory", (), {"available": host_mib * MIB})
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: host)
        monkeypatch.setattr(memory, "device_name", str)
        return plan_memory(spec, needs, device, **arguments)

    return plan_with


def test_what_is_not_experts_is_what_the_loaded_model_has(meta_model):
    model = load("demo", link="none", announce=lambda _: None)
    loaded = {id(t): t for t in (*model.hf.parameters(), *model.hf.buffers())}.values()
    assert meta_model.other_bytes == sum(t.numel() * t.element_size() for t in loaded)


def test_everything_gets_a_slot_where_it_fits(plan):
    made = plan(GPU, 1000)
    assert made.slots.n_slots == 64
    assert made.slot_bytes == made.store_bytes
    assert made.fits_host


def test_otherwise_what_is_left_less_a_tenth(plan):
    made = plan(GPU, 60)
    left = 0.9 * 60 * MIB - made.needs.total
    assert made.slots.n_slots < 64
    assert left - 2 * made.slots.slot_bytes[0] < made.slot_bytes <= left
    staging = N_STAGING * made.slots.slot_bytes[0]
    assert made.slot_bytes == made.slots.n_slots * made.slots.slot_bytes[0] + staging


def test_on_the_cpu_store_and_slots_share_the_memory(plan):
    assert plan(CPU, 200).fits_host
    made = plan(CPU, 100)
    assert not made.fits_host
    assert made.slot_bytes + made.host_bytes + made.needs.total <= 0.9 * 100 * MIB


def test_host_memory_decides_between_memory_and_disk(plan):
    assert plan(GPU, 1000, host_memory="48MiB").fits_host
    assert not plan(GPU, 1000, host_memory="47MiB").fits_host
    assert not plan(GPU, 1000, host_mib=50).fits_host
    text = str(plan(GPU, 1000, host_memory="10MiB"))
    assert "48.0MiB on disk, the last 10.0MiB read kept in host memory" in text


def test_the_plan_says_its_numbers(plan):
    text = str(plan(GPU, 1000, expert_memory="50%"))
    for words in ("on cuda:0, 900.0MiB to plan with", "1 x 256 tokens", "expert slots: 30 of"):
        assert words in text


def test_what_does_not_fit_is_refused_with_what_does(plan):
    with pytest.raises(MemoryError, match=r"(?s)48\.0MiB of expert slots.*of 40\.0MiB free") as e:
        plan(GPU, 40, expert_memory="100%")
    advised = str(e.value).rpartition("expert_memory='")[2].partition("'")[0]
    assert plan(GPU, 40, expert_memory=advised).slots.n_slots >= 8


def test_what_cannot_fit_at_all_says_what_to_give_up(plan):
    with pytest.raises(MemoryError, match="smaller max_context_tokens or batch_size, or a lower"):
        plan(GPU, 20, expert_memory="100%")


def test_a_longer_context_takes_more(meta_model):
    short, long = (memory_needs(meta_model, 2, CPU, tokens) for tokens in (256, 512))
    assert long.kv_cache == 2 * short.kv_cache == 2 * 256 * 8 * 2 * 4 * 32 * 2
    assert memory_needs(meta_model, 2, CPU, 256, 2).kv_cache == long.kv_cache


def test_nothing_that_fits_is_refused_with_the_numbers(plan):
    with pytest.raises(MemoryError, match=r"of 20\.0MiB free .*smaller max_context_tokens"):
        plan(GPU, 20)


def test_a_budget_that_is_too_small_says_by_how_much(plan):
    with pytest.raises(ValueError, match=r"raise the budget by (\d+) experts") as refusal:
        plan(GPU, 1000, expert_memory="1MiB")
    n_more = int(re.search(r"by (\d+) experts", str(refusal.value))[1])
    one = plan(GPU, 1000).slots.slot_bytes[0]
    assert plan(GPU, 1000, expert_memory=int(MIB + n_more * one)).slots.n_slots == 8


def test_surrogates_come_out_of_the_budget(plan):
    one = int(plan(GPU, 1000).slots.slot_bytes[0])
    alone = plan(GPU, 1000, expert_memory="50%")
    beside = plan(GPU, 1000, expert_memory="50%", surrogate_bytes=8 * one)
    assert beside.slots.n_slots == alone.slots.n_slots - 8
    assert beside.slot_bytes + beside.surrogate_bytes == alone.slot_bytes
    assert not alone.surrogate_bytes
    tight = plan(GPU, 60, surrogate_bytes=8 * one)
    assert tight.slot_bytes + tight.surrogate_bytes <= 0.9 * 60 * MIB - tight.needs.total
    assert plan(GPU, 1000, surrogate_bytes=8 * one).slots.n_slots == 64
    with pytest.raises(ValueError, match=r"staging of 2 and 30\.0 MiB beside it included"):
        plan(GPU, 1000, expert_memory="50%", surrogate_bytes=30 * MIB)


def test_a_configs_slots_and_surrogates_must_fit_together(plan):
    slots = plan(GPU, 60, expert_memory="50%").slots
    with pytest.raises(MemoryError, match="does not fit"):
        plan(GPU, 60, slots=slots, surrogate_bytes=30 * MIB)


def test_a_wrong_size_is_named_by_its_argument(plan):
    with pytest.raises(ValueError, match="host_memory='12 gigs' is not a size"):
        plan(GPU, 1000, host_memory="12 gigs")


def test_a_config_without_a_plan_keeps_the_slots_the_model_was_loaded_with():
    model = load("demo", link="none", expert_memory="40%", announce=lambda _: None)
    with model.running(TunedConfig.untuned(model.spec)):
        slots = model.engine.plan.slots.tolist()
    assert slots == model.memory.slots.slots.tolist()
    assert max(slots) < 8


def test_slots_that_do_not_fit_leave_the_model_as_it_was(monkeypatch):
    model = load("demo", link="none", expert_memory="40%", announce=lambda _: None)
    before, gating = model.config, model.engine.gating
    cuts = GatingTable.per_layer([0.7] * 8, 2)
    make = offload.CachedExperts

    def out_of_memory(store, link, device, plan, *eviction):
        if max(plan.slots) == 8:
            raise MemoryError("no room")
        return make(store, link, device, plan, *eviction)

    monkeypatch.setattr(offload, "CachedExperts", out_of_memory)
    greedy = replace(before, plan=slots_plan(model.spec, 8), gating=cuts)
    with pytest.raises(MemoryError, match="no room"), model.running(greedy):
        raise AssertionError("it must not run")
    assert model.config is before
    assert model.engine.gating is gating
    assert model.engine.plan is before.plan
