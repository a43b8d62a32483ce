"""What the doctor says of machines it is shown, and of this one."""

import pytest
import torch
from tiny_models import save_tiny
from transformers import MixtralConfig

from adapmoe_lab.cli.doctor import Machine, examine, fits, known_models, model_report, report
from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.memory_plan import FreeMemory, memory_needs, plan_memory
from adapmoe_lab.engine.store.builder import expert_formats
from adapmoe_lab.models.checkpoint.checkpoint import look_at_model
from adapmoe_lab.models.checkpoint.meta_model import describe, meta_model_of

GIB = 2**30


def test_this_machine_is_described():
    text = report(examine())
    assert "torch " in text
    assert "host memory" in text
    assert "GB/s" in text
    assert "What would fit" in text


def test_without_a_gpu_it_says_what_runs_instead():
    text = report(Machine("CPU", None, 16 * GIB, 1e10))
    assert "torch sees no CUDA device" in text
    assert "results say 'emulated'" in text
    why = "executor='graph' needs a CUDA device; this is cpu"
    assert f"graphs         none, steps are driven by the host: {why}\n" in text
    assert "OLMoE-1B-7B         12.0 GiB of experts: fits host memory" in text
    assert "Mixtral-8x7B        84.0 GiB of experts: does not fit host memory" in text


def test_with_a_gpu_it_says_how_much_fits_and_what_a_load_takes():
    text = report(Machine("GPU", 24 * GIB, 128 * GIB, 25e9))
    assert "24.0 GiB free" in text
    assert "graphs         " in text
    assert "OLMoE-1B-7B         12.0 GiB of experts: 100% of them on the GPU" in text
    assert "Mixtral-8x7B        84.0 GiB of experts: 21% of them on the GPU at once" in text
    assert "loading one takes 14.09 ms" in text


def test_a_gpu_too_small_for_an_expert_of_each_layer_is_told_so():
    assert "the GPU has no room for one of each layer" in report(
        Machine("GPU", GIB, 256 * GIB, 25e9)
    )


@pytest.mark.parametrize(
    ("name", "expert_mib"), [("Mixtral-8x7B", 336), ("OLMoE-1B-7B", 12), ("Qwen3-30B-A3B", 9)]
)
def test_sizes_are_the_published_ones(name, expert_mib):
    (model,) = [model for model in known_models() if model.name == name]
    assert model.expert_bytes == expert_mib * 2**20
    assert model.other_bytes > 0


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("precision", ["float32", "int4"])
def test_what_it_says_of_a_model_is_what_is_then_taken(model_type, precision, tmp_path):
    folder = save_tiny(model_type, tmp_path)
    meta_model = look_at_model(folder)
    (fit,) = [f for f in fits(meta_model, examine()) if f.precision == precision]
    model = load(folder, expert_dtype=precision, device="cpu", link="none")
    assert fit.all_experts_bytes == pytest.approx(model.store.n_bytes, rel=0.05)
    assert fit.expert_bytes == pytest.approx(model.spec.stored_expert_bytes, rel=0.05)
    others = {id(t): t for t in (*model.hf.parameters(), *model.hf.buffers())}.values()
    taken = sum(t.numel() * t.element_size() for t in others)
    assert meta_model.other_bytes == pytest.approx(taken, rel=0.05)


def test_a_model_is_judged_by_its_config_alone(tmp_path):
    folder = save_tiny("deepseek_v3", tmp_path)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    text = model_report(look_at_model(folder), Machine("GPU", 24 * GIB, 128 * GIB, 25e9))
    assert "deepseek_v3, 2 layers x 8 experts, top-2" in text
    assert "family: exact; scores are sigmoid" in text
    assert "decode steps as a CUDA graph: captured" in text
    assert "beside the experts, in float32: " in text
    for precision in ("bfloat16", "int4", "int2"):
        assert f"\n{precision}" in text


def test_mixtral_on_a_small_gpu():
    """Published dimensions: 45.1e9 of its 46.7e9 parameters are experts."""
    config = MixtralConfig(dtype="bfloat16")
    mixtral = meta_model_of("mixtral", config, "bfloat16")
    machine = Machine("GPU", 24 * GIB, 64 * GIB, 25e9)
    by_name = {fit.precision: fit for fit in fits(mixtral, machine)}
    assert by_name["bfloat16"].expert_bytes == 3 * 4096 * 14336 * 2
    assert not by_name["bfloat16"].fits_host
    assert by_name["int4"].fits_host
    assert 0.6 < by_name["int4"].device_share < 0.8
    assert by_name["bfloat16"].most_s_per_token == pytest.approx(2 * 32 * 352.3e6 / 25e9, rel=1e-3)


@pytest.mark.parametrize("on_device", [24 * GIB, None])
def test_it_says_what_the_memory_plan_would_do(on_device):
    mixtral = meta_model_of("mixtral", MixtralConfig(dtype="bfloat16"), "bfloat16")
    machine = Machine("some", on_device, 64 * GIB, 25e9)
    device = torch.device("cpu" if on_device is None else "cuda")
    for fit in fits(mixtral, machine, 1024):
        spec = describe(mixtral, expert_formats(mixtral, fit.precision))
        needs, free = (
            memory_needs(mixtral, 2, device, 1024),
            FreeMemory(on_device or 64 * GIB, 64 * GIB),
        )
        if fit.device_share is None:
            with pytest.raises(MemoryError):
                plan_memory(spec, needs, device, free=free)
        else:
            plan = plan_memory(spec, needs, device, free=free)
            assert fit.device_share == plan.slots.n_slots / 256
            assert fit.fits_host == plan.fits_host


def test_too_small_a_gpu_has_no_slots():
    mixtral = meta_model_of("mixtral", MixtralConfig(dtype="bfloat16"), "bfloat16")
    machine = Machine("GPU", 4 * GIB, 64 * GIB, 25e9)
    assert [fit.device_share for fit in fits(mixtral, machine)] == [None] * 8
    assert "none" in model_report(mixtral, machine)
