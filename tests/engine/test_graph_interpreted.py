"""Kernels of a captured step without a GPU: what they compute, and that they compile for one.

Triton's interpreter runs the tests that a GPU would run too, its programs one after the other: what
takes several at once, or the order of threads, it cannot show.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from interpreted import assert_compiles, check_interpreted
from toy_policies import TOY

from adapmoe_lab.policies.eviction.policy import EvictionPolicy
from adapmoe_lab.policies.eviction.registry import POLICIES

pytest.importorskip("triton", reason="triton, which runs on Linux only, is not installed")

ON_DEVICE = [policy for policy in [*POLICIES.values(), TOY] if not policy.host_only]


def made_with(step):
    """Return a policy whose function closes over a constant and a function."""

    def later(clock):
        return step * clock

    def after_use(priority, state, use):
        return priority + later(use.clock), state

    return EvictionPolicy("made", after_use)


@pytest.fixture(autouse=True)
def _nothing_is_compiled_before(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_in_tritons_interpreter_the_kernels_pass_their_tests():
    check_interpreted("tests/gpu/test_graph_kernels.py", "--noconftest")


@pytest.mark.slow
def test_in_tritons_interpreter_the_executor_passes_its_tests():
    files = ("test_graph_serving.py", "test_graph_compiled.py", "test_graph_probe.py")
    check_interpreted(*(f"tests/gpu/{name}" for name in files))


@pytest.mark.slow
def test_in_tritons_interpreter_families_that_differ_in_what_they_keep_pass_their_tests():
    some = "cohere2_moe or deepseek_v32 or lfm2_moe or phimoe or states or gpt_oss"
    check_interpreted("tests/gpu/test_graph_families.py", "-k", some)


@pytest.mark.parametrize(("n_layers", "n_experts", "n_warps"), [(1, 256, 1), (58, 256, 16)])
@pytest.mark.parametrize("policy", [*ON_DEVICE, made_with(3)], ids=lambda policy: policy.name)
def test_the_step_compiles_for_a_gpu(policy, n_layers, n_experts, n_warps):
    from adapmoe_lab.engine.graph.operators import policy_arguments, prepare_policy
    from adapmoe_lab.engine.graph.step_kernel import step_kernel

    shape = {
        "n_layers": n_layers, "n_experts": n_experts, "n_places": n_layers * n_experts, "top_k": 8,
        "experts_padded": n_experts, "all_padded": 2**14 if n_layers > 1 else n_experts,
        "top_k_padded": 8,
    }  # fmt: skip
    floats = dict.fromkeys(("weights", "scores", "cuts", "coefficients", "dropped"), "*fp32")
    longs = ("ids", "priority", "clocks", "hits", "misses", "skipped", "reads", "writes")
    addresses = ("host_addresses", "slot_addresses")
    types = {**floats, **dict.fromkeys((*longs, *addresses), "*i64"), "layer": "i32"}
    assert_compiles(
        step_kernel, types, {**shape, **policy_arguments(prepare_policy(policy))}, n_warps
    )


def test_a_policy_that_does_not_compile_is_refused_by_name(monkeypatch):
    from triton import CompilationError

    from adapmoe_lab.engine.graph import operators, step_tables
    from adapmoe_lab.engine.graph.requirements import CaptureError

    class Failing:
        def __getitem__(self, grid):
            raise CompilationError(None, None, "unsupported")

    monkeypatch.setattr(operators, "step_kernel", Failing())
    tables = step_tables.StepTables(np.ones((1, 4)), made_with(3), False, 2, torch.device("cpu"))
    with pytest.raises(CaptureError, match="'made' needs the host: its functions are not plain"):
        tables.decide(0, torch.arange(2), torch.ones(2))


def test_a_policy_whose_source_is_not_found_is_refused_by_name():
    from adapmoe_lab.engine.graph.operators import prepare_policy
    from adapmoe_lab.engine.graph.requirements import CaptureError

    made = {}
    exec("def after_use(priority, state, use):\n    return use.clock, state\n", made)  # noqa: S102
    policy = EvictionPolicy("typed", made["after_use"])
    with pytest.raises(CaptureError, match="'typed' needs the host: its functions are not plain"):
        prepare_policy(policy)


def test_policies_of_one_text_are_told_apart_by_their_constants():
    from adapmoe_lab.engine.graph.operators import prepare_policy

    assert len({prepare_policy(made_with(step)) for step in (3, 5, 3)}) == 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_products_compile_for_a_gpu(precision):
    from adapmoe_lab.engine.graph.product_kernel import served_product_kernel

    types = dict.fromkeys(("offset", "x_stride", "n_rows", "n_columns"), "i32")
    types |= {"x": f"*{precision}", "out": f"*{precision}", "reads": "*i64", "writes": "*i64"}
    shape = {"rows_at_once": 4, "columns_at_once": 1024}
    aligned = ("x", "out", "reads", "writes", "columns", "n_rows", "n_columns")
    compiled = assert_compiles(served_product_kernel, types, shape, 4, aligned)
    accesses = re.findall(r"(?:ld|st)\.global[.\w]*", compiled.asm["ptx"])
    of_experts = [access for access in accesses if ".v" in access]
    assert {"ld.global.v4.b32", "st.global.v4.b32"} <= set(of_experts), "16 bytes at once"
    assert accesses.count("ld.global.b16") <= 8, "the vector alone is read otherwise"
