"""The engine on a real GPU: real pinned memory, real copy streams, the same answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from replays import step_by_step
from runs import PROMPT, decode, half_cached
from transformers import AutoModelForCausalLM

from adapmoe_lab.cli.doctor import examine
from adapmoe_lab.engine.generation.tokens import generate_tokens
from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.transfer.clock import RealClock
from adapmoe_lab.engine.transfer.link import CudaLink
from adapmoe_lab.evaluation.latency import measure_latency
from adapmoe_lab.evaluation.loss import evaluate_loss
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.profiling.hardware.probe import probe_hardware
from adapmoe_lab.profiling.routing.recorder import RoutingRecorder
from adapmoe_lab.records import GatingTable, PrefetchSource, PrefetchTable, TunedConfig
from adapmoe_lab.records.step_costs import N_CHUNKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def config_with(model, slots, cuts=None):
    spec = model.spec
    gating = None if cuts is None else GatingTable.per_layer(cuts, spec.top_k)
    return replace(TunedConfig.untuned(spec), plan=slots_plan(spec, slots), gating=gating)


@pytest.fixture(scope="module")
def demo():
    return load("demo", device="cuda", dtype="float32")


@pytest.mark.parametrize("slots", range(9))
def test_demo_equals_the_unmodified_model_at_every_cache_size(demo, slots):
    plain = AutoModelForCausalLM.from_pretrained("data/demo", dtype=torch.float32).cuda()
    demo.apply(config_with(demo, slots))
    ids = demo.encode(PROMPT)
    with torch.no_grad():
        expected = plain(ids[None].cuda()).logits
        assert (demo.hf(ids[None].cuda()).logits - expected).abs().max() <= 1e-4
    assert decode(demo.hf, ids, 32) == decode(plain, ids, 32)


@pytest.mark.parametrize("cuts", [None, [0.7] * 8])
@pytest.mark.parametrize("slots", [0, 1, 4, 8])
def test_counters_equal_a_plain_replay(demo, slots, cuts):
    demo.apply(config_with(demo, slots, cuts))
    recorder = RoutingRecorder(demo)
    with recorder.recording():
        decode(demo.hf, demo.encode(PROMPT), 48)
    hits, misses = step_by_step(recorder.trace(), cuts or [2.0] * 8, slots)
    np.testing.assert_array_equal(demo.engine.traffic.hits, hits.sum(axis=0))
    np.testing.assert_array_equal(demo.engine.traffic.misses, misses.sum(axis=0))


@pytest.mark.parametrize("slots", [0, 1, 4])
def test_fetching_ahead_changes_no_text_and_overwrites_nothing_in_use(demo, slots):
    spec = demo.spec
    sure = np.full((spec.n_layers, spec.top_k), 0.95)
    spoken = [("next_router", 1), ("next_router", 2), ("own_norm", 1), ("token_embedding", 0)]
    table = PrefetchTable([PrefetchSource(*who, sure) for who in spoken], buffer_slots=3)
    demo.apply(config_with(demo, 8))
    ids = demo.encode(PROMPT)
    expected = decode(demo.hf, ids, 48)
    demo.apply(replace(config_with(demo, slots), prefetch=table))
    for _ in range(3):
        assert decode(demo.hf, ids, 48) == expected
    assert demo.engine.traffic.prefetch_used.sum() > 0


def test_pieces_fill_the_time_that_is_expected_to_be_quiet_and_no_more():
    link = CudaLink(torch.device("cuda"), RealClock())
    source = torch.randint(255, (2**28,), dtype=torch.uint8, pin_memory=True)
    target = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    copy = link.issue_prefetch(source, target, priority=0)
    chunk_s = link.seconds(2**28 // N_CHUNKS)
    link.begin_chunks()
    link.expect_quiet(until=link.clock.now())
    assert copy.n_begun == 0
    link.expect_quiet(until=link.clock.now() + 1.5 * chunk_s)
    link.begin_chunks()
    assert copy.n_begun == 2
    demanded = link.copy(source[:8], target[-8:])
    link.expect_quiet(until=link.clock.now())
    assert copy.n_begun == 2
    link.wait(demanded)
    torch.cuda.synchronize()
    assert torch.equal(target[: 2**27].cpu(), source[: 2**27])
    assert not target[2**27 : -8].any()
    link.finish(copy)
    link.wait(copy.arrival)
    torch.cuda.synchronize()
    assert torch.equal(target.cpu(), source)


def test_experts_are_pinned_and_slots_are_on_the_device(demo):
    assert isinstance(demo.link, CudaLink)
    assert all(demo.store.buffer(*number).is_pinned() for number in demo.store.numbers())
    assert not any(parameter.numel() for parameter in demo.layers[0].experts.parameters())
    allocated = torch.cuda.memory_allocated()
    demo.apply(config_with(demo, 2))
    freed = allocated - torch.cuda.memory_allocated()
    demo.apply(config_with(demo, 8))
    regained = torch.cuda.memory_allocated() - allocated
    assert freed >= 0
    assert regained >= -freed


def test_a_slot_is_never_overwritten_while_it_is_read(demo):
    """One slot per layer and long prompts: every copy follows a kernel that reads the slot."""
    text = PROMPT + " lived in the forest with his brother." * 12
    demo.apply(config_with(demo, 8))
    with torch.no_grad():
        expected = demo.hf(demo.encode(text)[None].cuda()).logits
        for slots in (1, 2, 3):
            demo.apply(config_with(demo, slots))
            for _ in range(10):
                again = demo.hf(demo.encode(text)[None].cuda()).logits
                torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)


def test_an_interrupt_leaves_it_exact(demo):
    demo.apply(config_with(demo, 8))
    expected = decode(demo.hf, demo.encode(PROMPT), 24)
    half_cached(demo)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 the interrupt comes between two tokens
        for step, _ in enumerate(generate_tokens(demo.decoder(), demo.encode(PROMPT), 24)):
            if step == 5:
                raise KeyboardInterrupt
    assert decode(demo.hf, demo.encode(PROMPT), 24) == expected


def test_loss_on_the_gpu_equals_that_on_the_cpu(demo):
    texts = [PROMPT + " lived in a big house near the river.", "def f(x):\n    return x\n"]
    on_cpu = load("demo", device="cpu", dtype="float32", link="none")
    config = config_with(demo, 4, [0.75] * 8)
    gpu, cpu = evaluate_loss(demo, config, texts), evaluate_loss(on_cpu, config, texts)
    np.testing.assert_allclose(gpu.nats, cpu.nats, rtol=1e-4)
    assert gpu.skipped_fraction == pytest.approx(cpu.skipped_fraction, abs=0.01)


def test_probe_and_latency_are_of_the_real_link(demo):
    hardware = probe_hardware(demo)
    assert hardware.link == "pcie"
    assert not hardware.is_emulated
    assert hardware.device == torch.cuda.get_device_name()
    assert (hardware.miss_s, hardware.host_copy_s) == (None, None)
    assert abs(hardware.wait_s) < 0.1
    assert hardware.link_bytes_per_s > 1e9
    assert (hardware.pageable_copy_s > 0).all()
    assert 1e-7 < hardware.launch_s < hardware.host_sync_s + 1e-4 < 1e-2
    assert {"bfloat16", "int8", "int4"} <= set(hardware.expert_s_by_precision)
    report = measure_latency(demo, config_with(demo, 4), [PROMPT], new_tokens=16, repeats=2)
    assert report.decode.median > 0
    assert report.decode_traffic.bytes_moved > 0
    assert examine().copy_bytes_per_s > 1e9


def test_a_real_link_cannot_be_emulated_over():
    with pytest.raises(ValueError, match="on cuda the real one is used"):
        load("demo", device="cuda", link="mixtral-8x7b-int4/pcie4-x16")
