"""Routing as training measures it, against routing as the engine records it."""

import numpy as np
import pytest
import torch

import adapmoe_lab as lab
from adapmoe_lab.assets import demo_folder
from adapmoe_lab.demo.routing_statistics import RoutingStatistics
from adapmoe_lab.models.demo_architecture import load_checkpoint, routing_taps

N_TOKENS = 64


def test_a_pass_of_the_unmodified_model_routes_as_the_trace_says(tmp_path):
    model = lab.load("demo", dtype="float32", device="cpu", link="none")
    texts = lab.calibration_texts()[:2]
    trace = lab.profile(model, texts, max_tokens=N_TOKENS, project=tmp_path)
    plain, _ = load_checkpoint(demo_folder(), dtype=torch.float32)
    with torch.no_grad(), routing_taps(plain) as taps:
        plain(torch.from_numpy(trace.token_ids.reshape(2, N_TOKENS).astype(np.int64)))
        found = RoutingStatistics.of_pass(plain, taps, n_sequences=2)
    predicted = trace.predictions["next_router"][1].experts
    starts = {0, N_TOKENS}
    for layer in range(8):
        sets = [set(row.tolist()) for row in trace.expert_indices[:, layer]]
        use = [sum(expert in chosen for chosen in sets) for expert in range(8)]
        assert found.expert_use[layer] == pytest.approx(np.array(use) / 128)
        repeated = [len(sets[t] & sets[t - 1]) / 2 for t in range(128) if t not in starts]
        assert found.locality[layer] == pytest.approx(np.mean(repeated))
        if layer:
            guesses = [set(row.tolist()) for row in predicted[:, layer]]
            hits = [len(a & b) / 2 for a, b in zip(sets, guesses, strict=True)]
            assert found.next_router_recall[layer] == pytest.approx(np.mean(hits))
    assert np.isnan(found.next_router_recall[0])
    assert found.n_tokens == 128
