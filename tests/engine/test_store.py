"""The store: whatever precision and wherever an expert lies, what is computed is what is stored."""

import numpy as np
import pytest
import torch
from checkpoints import save_tiny_mixtral
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.store.expert_store import BUFFER_ALIGNMENT
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.records import PRECISIONS

IDS = torch.arange(1, 60)[None]
L, E = 3, 4
SETTINGS = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(
    names=st.lists(st.sampled_from(sorted(PRECISIONS)), min_size=L * E, max_size=L * E),
    n_slots=st.integers(0, E),
    broken_copy=st.integers(1, 12),
)
@SETTINGS
@torch.no_grad()
def test_what_is_computed_is_what_is_stored(tiny_checkpoint, names, n_slots, broken_copy):
    """Experts of mixed precision, few slots, and a transfer that breaks somewhere."""
    precisions = np.array(names).reshape(L, E).tolist()
    model = load(
        tiny_checkpoint, dtype="float32", expert_dtype=precisions, device="cpu", link="none",
        announce=lambda _: None,
    )  # fmt: skip
    with model.engine.reading_store():
        expected = model.hf(IDS).logits
    plan = slots_plan(model.spec, n_slots)
    with model.running(model.config.__class__.untuned(model.spec)) as running:
        running.engine.configure(None, plan)
        break_a_copy(running, broken_copy)
        assert torch.equal(running.hf(IDS).logits, expected)
        assert torch.equal(running.hf(IDS).logits, expected)
    dense = model.detach()(IDS).logits
    torch.testing.assert_close(expected, dense, rtol=1e-4, atol=1e-4)


def break_a_copy(model, number):
    """Let the given copy fail once; a forward that needs fewer copies succeeds."""
    link, copy = model.link, model.link.copy
    left = number

    def failing(source, target):
        nonlocal left
        left -= 1
        if left == 0:
            raise ConnectionError("the link broke")
        return copy(source, target)

    link.copy = failing
    try:
        model.hf(IDS)
    except ConnectionError:
        assert left <= 0
    finally:
        del link.copy


@pytest.mark.parametrize("name", sorted(PRECISIONS))
@torch.no_grad()
def test_every_precision_is_close_to_the_unmodified_model(tiny_checkpoint, name):
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)(IDS).logits
    model = load(tiny_checkpoint, dtype="float32", expert_dtype=name, device="cpu", link="none")
    error = (model.hf(IDS).logits - plain).std() / plain.std()
    most = {"float32": 1e-5, "bfloat16": 0.06, "float16": 0.01, "int8": 0.06, "int4": 0.35}
    assert error <= most.get(name, 1.2)
    assert model.spec.dtype == name
    assert model.spec.stored_expert_bytes == model.store.slot_bytes(0)


def test_bytes_moved_are_those_of_each_expert(tiny_checkpoint):
    precisions = [["float32", "int8", "int4", "mxfp4"]] * L
    model = load(
        tiny_checkpoint, dtype="float32", expert_dtype=precisions, device="cpu", link="none"
    )
    assert model.spec.dtype == "3 x float32, 3 x int4, 3 x int8, 3 x mxfp4"
    assert model.spec.all_experts_bytes == model.store.n_bytes
    sizes = model.store.expert_bytes
    assert (np.diff(sizes, axis=1) < 0).all()
    assert model.config.plan.slot_bytes.tolist() == [sizes[0, 0]] * L
    model.hf(IDS)
    assert model.engine.traffic.misses.sum() == L * E
    assert model.engine.traffic.bytes_moved == sizes.sum()


def test_rows_are_aligned_and_do_not_overlap(tiny_checkpoint):
    precisions = [["float32", "int8", "int3", "mxfp4"]] * L
    model = load(
        tiny_checkpoint, dtype="float32", expert_dtype=precisions, device="cpu", link="none"
    )
    store = model.store
    for layer in range(L):
        rows = [store.buffer(layer, expert) for expert in range(E)]
        starts = [row.data_ptr() - rows[0].data_ptr() for row in rows]
        assert all(start % BUFFER_ALIGNMENT == 0 for start in starts)
        ends = [start + row.numel() for start, row in zip(starts, rows, strict=True)]
        assert all(end <= start for end, start in zip(ends[:-1], starts[1:], strict=True))


@pytest.mark.parametrize(
    ("expert_dtype", "expected"),
    [
        ("int5", "'int5' is not a precision experts can be stored in; give one of float32,"),
        ([["int4"] * E] * 2, "names 8 precisions in 2 layers; .* has 3 layers of 4 experts"),
        ([["int4"] * 3] * L, "names 9 precisions in 3 layers"),
    ],
)
def test_a_wrong_precision_is_refused(load_tiny, expert_dtype, expected):
    with pytest.raises(ValueError, match=expected):
        load_tiny(expert_dtype=expert_dtype)


@pytest.mark.parametrize("expert_dtype", ["auto", "int4"])
def test_weights_that_are_no_numbers_are_warned_of(tmp_path, expert_dtype):
    folder = save_tiny_mixtral(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if "layers.1" in key and ".2." in key and "w2" in key)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    expected = "Expert 2 of MoE layer 1: down_proj holds NaN or infinite weights"
    with pytest.warns(UserWarning, match=expected):
        load(folder, expert_dtype=expert_dtype, device="cpu", link="none")
