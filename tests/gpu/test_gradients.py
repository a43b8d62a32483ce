"""The backward pass on a real GPU: little device memory, and the same gradients as on the CPU."""

import numpy as np
import pytest
import torch
from checkpoints import byte_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM

from adapmoe_lab.engine.loading import load
from adapmoe_lab.profiling.sensitivity.sensitivity import sensitivity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

TEXTS = ["Once upon a time there was a little girl who lived in the woods.", "def square(x):\n"]


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory):
    """Return a checkpoint of 48 experts of 6 MiB each."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=2048, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_backward_pass_holds_one_layer_and_one_expert(wide_checkpoint):
    expected = sensitivity(load(wide_checkpoint, device="cpu", link="none"), TEXTS)
    model = load(wide_checkpoint, device="cuda", expert_memory="18%", max_context_tokens=128)
    assert model.engine.plan.slots.max() <= 2
    expert_bytes = model.spec.stored_expert_bytes
    sensitivity(model, TEXTS[1:], anchored=False)  # cuBLAS keeps a workspace for each thread
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = sensitivity(model, TEXTS)
    beyond = torch.cuda.max_memory_allocated() - before
    assert beyond < 3 * expert_bytes, f"{beyond / expert_bytes:.1f} experts"
    np.testing.assert_allclose(found.fisher, expected.fisher, rtol=1e-3)
    np.testing.assert_allclose(found.increase_nats, expected.increase_nats, rtol=5e-3, atol=1e-9)


@pytest.mark.parametrize("expert_dtype", ["int8", "int4"])
def test_packed_experts_have_gradients_on_the_device(wide_checkpoint, expert_dtype):
    on_cpu = load(wide_checkpoint, device="cpu", link="none", expert_dtype=expert_dtype)
    model = load(
        wide_checkpoint, device="cuda", expert_dtype=expert_dtype, expert_memory="20%",
        max_context_tokens=128,
    )  # fmt: skip
    expected = sensitivity(on_cpu, TEXTS, anchored=False)
    found = sensitivity(model, TEXTS, anchored=False)
    np.testing.assert_allclose(found.fisher, expected.fisher, rtol=0.05)
