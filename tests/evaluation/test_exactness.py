"""Served logits and tokens against the plain model's: the bound, and what counts as a tie."""

from dataclasses import replace

import numpy as np
import torch
from runs import PROMPT, decode, half_cached
from transformers import AutoModelForCausalLM

from adapmoe_lab.evaluation.exactness import Exactness, compare_with_plain, error_bound
from adapmoe_lab.records import GatingTable
from adapmoe_lab.tuning.verify.exactness import check_exactness


@torch.no_grad()
def test_errors_are_those_of_the_unmodified_model(load_tiny, tiny_checkpoint):
    """Nothing is skipped in the comparison, whatever the config skips."""
    model = half_cached(load_tiny())
    gated = replace(model.config, gating=GatingTable.per_layer([0.5] * 3, 2))
    experts = model.store.views(0, 0, model.store.buffer(0, 0))
    next(iter(experts.values()))[0, 0] += 0.5
    ids, prompt = model.encode("Once upon a time"), model.encode(PROMPT)
    found = compare_with_plain(model, gated, [ids], prompt, 6)

    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    tokens = torch.tensor(decode(model.hf, prompt, 6))
    whole = torch.cat([prompt, tokens])[:-1]
    rows = []
    for text in (ids, whole):
        right, served = (hf(text[None]).logits[0] for hf in (plain, model.hf))
        rows.append((served - right).norm(dim=1) / right.norm(dim=1))
    expected = torch.cat([rows[0], rows[1][len(prompt) - 1 :]])
    np.testing.assert_allclose(found.errors, expected, rtol=1e-3, atol=1e-6)
    assert found.errors.max() > found.bound
    assert not found.is_exact
    right = plain(whole[None]).logits[0, len(prompt) - 1 :]
    gaps = right.amax(dim=1) - right.gather(1, tokens[:, None])[:, 0]
    np.testing.assert_allclose(found.gaps, gaps / right.abs().amax(dim=1), atol=1e-6)


def test_a_tie_is_no_other_token_and_rerouted_positions_are_let_pass_on_a_gpu_only():
    cpu = error_bound(torch.float32, torch.device("cpu"))
    gpu = error_bound(torch.bfloat16, torch.device("cuda"))
    assert (cpu, gpu) == ((1e-5, 1.0), (8 * 2**-8, 0.9))
    errors, gaps = np.zeros(20), np.zeros(20)
    errors[:2], gaps[0] = 1.0, 1e-6
    assert not Exactness(errors, gaps, *cpu, "x").is_exact
    assert Exactness(errors, gaps, *gpu, "x").is_exact
    tied = check_exactness(Exactness(np.zeros(20), gaps, *cpu, "x"))
    assert tied.verdict == "passed"
    assert "19 of 20 decoded tokens the same, 1 tied" in tied.found
    gaps[0] = 1e-4
    assert not Exactness(np.zeros(20), gaps, *cpu, "x").is_exact
