"""What the doctor says of machines it is shown, and of this one."""

import pytest

from adapmoe_lab.doctor import Machine, examine, known_models, report

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
    assert "OLMoE-1B-7B         12.0 GiB of experts: fits host memory" in text
    assert "Mixtral-8x7B        84.0 GiB of experts: does not fit host memory" in text


def test_with_a_gpu_it_says_how_much_fits_and_what_a_load_takes():
    text = report(Machine("GPU", 24 * GIB, 128 * GIB, 25e9))
    assert "24.0 GiB free" in text
    assert "OLMoE-1B-7B         12.0 GiB of experts: 100% of them on the GPU" in text
    assert "Mixtral-8x7B        84.0 GiB of experts: 22% of them on the GPU at once" in text
    assert "loading one takes 14.09 ms" in text


def test_a_gpu_too_small_for_the_rest_is_told_so():
    assert "what is not experts does not fit" in report(Machine("GPU", GIB, 256 * GIB, 25e9))


@pytest.mark.parametrize(
    ("name", "expert_mib"), [("Mixtral-8x7B", 336), ("OLMoE-1B-7B", 12), ("Qwen3-30B-A3B", 9)]
)
def test_sizes_are_the_published_ones(name, expert_mib):
    (model,) = [model for model in known_models() if model.name == name]
    assert model.expert_bytes == expert_mib * 2**20
    assert model.other_bytes > 0
