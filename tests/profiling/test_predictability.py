"""Fitted predictors against numpy's least squares, counting, and the unmodified model's states."""

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from adapmoe_lab.engine.loading import load
from adapmoe_lab.profiling.predictors.fit import fit_predictors
from adapmoe_lab.profiling.predictors.linear_maps import RIDGES, fit_gate, fit_ridges
from adapmoe_lab.profiling.routing.profile import profile
from adapmoe_lab.records import RecordError
from adapmoe_lab.simulation.statistics.predictability import recall_and_precision


def least_squares(inputs, outputs, ridge):
    """Return the ridge map [D+1, E] as plain least squares on rows added for the penalty."""
    mean = inputs.mean(axis=0)
    centred = inputs - mean
    width = inputs.shape[1]
    penalty = np.sqrt(ridge * (centred**2).sum() / width) * np.eye(width)
    rows = np.concatenate([centred, penalty])
    wanted = np.concatenate([outputs - outputs.mean(axis=0), np.zeros((width, outputs.shape[1]))])
    slopes = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return np.vstack([slopes, outputs.mean(axis=0) - mean @ slopes])


def recall_of(weights, inputs, chosen):
    """Return the share of chosen experts [T, K] that are among the best K, counted by sets."""
    scores = inputs @ weights[:-1] + weights[-1]
    best = np.argsort(-scores, axis=1)[:, : chosen.shape[1]]
    return np.mean([len(set(a) & set(b)) for a, b in zip(best, chosen, strict=True)])


def expected_ridge(inputs, logits, chosen, is_held_out):
    """Return the map of least squares at the ridge that recalls best on what is held out."""
    recalls = [
        recall_of(
            least_squares(inputs[~is_held_out], logits[~is_held_out], ridge),
            inputs[is_held_out],
            chosen[is_held_out],
        )
        for ridge in RIDGES.numpy()
    ]
    return least_squares(inputs, logits, RIDGES[int(np.argmax(recalls))].item())


def test_a_ridge_map_is_least_squares_at_the_strength_that_recalls_best():
    rng = np.random.default_rng(0)
    inputs = rng.normal(3.0, 1.0, (90, 40))
    logits = inputs @ rng.normal(size=(40, 6)) + rng.normal(0, 12.0, (90, 6))
    chosen = np.argsort(-logits, axis=1)[:, :2]
    is_held_out = np.arange(90) % 3 == 1
    target = torch.from_numpy(logits), torch.from_numpy(chosen)
    (found,) = fit_ridges(torch.from_numpy(inputs), [target], torch.from_numpy(is_held_out))
    expected = expected_ridge(inputs, logits, chosen, is_held_out)
    np.testing.assert_allclose(found, expected, atol=1e-8)
    plain = np.linalg.lstsq(np.c_[inputs, np.ones(90)], logits, rcond=None)[0]
    assert np.abs(found.numpy() - plain).max() > 0.1, "without noise to hold back nothing is shown"


def test_a_gate_finds_the_distribution_that_made_the_shares():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 5, generator=generator) * 7 + 2
    truth = torch.randn(6, 4, generator=generator) / 7
    shares = (inputs @ truth[:-1] + truth[-1]).softmax(dim=-1)
    gate = fit_gate(inputs, shares, torch.arange(400) % 4 == 1).float()
    found = (inputs @ gate[:-1] + gate[-1]).softmax(dim=-1)
    torch.testing.assert_close(found, shares, rtol=0, atol=5e-3)


def test_a_gate_of_noise_says_little():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 40, generator=generator)
    shares = torch.softmax(3 * torch.randn(60, 4, generator=generator), dim=-1)
    is_held_out = torch.arange(60) % 4 == 1
    gate = fit_gate(inputs, shares, is_held_out).float()
    spread = (inputs @ gate[:-1]).std()
    assert spread < 0.5


TEXTS = [
    "Once upon a time there was a little girl who lived in the woods.",
    "def square(x):\n    return x * x\n\nprint(square(3))\n",
    "The king told the queen that he would never come home again.",
    "One is not two, and two is not three; three is more than both.",
    "Rain fell on the town, on the river and on the hills behind it.",
]


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def checkpoint(request, tmp_path_factory):
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param))


def opened(checkpoint, **arguments):
    given = {"device": "cpu", "link": "none", "dtype": "float32", **arguments}
    return load(checkpoint, announce=lambda _: None, **given)


@torch.no_grad()
def plain_passes(checkpoint, sequences):
    """Return each layer's inputs and logits, and last hidden states, of the unmodified model."""
    hf = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    blocks = [layer.mlp for layer in hf.model.layers if hasattr(layer.mlp, "experts")]
    inputs, logits = [[] for _ in blocks], [[] for _ in blocks]
    states = []
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(
            lambda _, args, number=number: inputs[number].append(args[0][0])
        )
        block.gate.register_forward_hook(
            lambda _, __, out, number=number: logits[number].append(out[0])
        )
    for ids in sequences:
        states.append(hf(ids[None], output_hidden_states=True).hidden_states[-1][0].numpy())
    stacked = [[torch.cat(parts).numpy() for parts in kind] for kind in (inputs, logits)]
    return *stacked, states, hf


def test_everything_is_fitted_to_what_the_unmodified_model_does(checkpoint):
    model = opened(checkpoint, expert_memory="60%")
    fitted = fit_predictors(model, TEXTS)
    sequences = [model.encode(text) for text in TEXTS]
    inputs, logits, _, hf = plain_passes(checkpoint, sequences)
    ids = np.concatenate(sequences)
    assert fitted.n_tokens == len(ids)
    is_held_out = np.repeat(np.arange(5) % 4 == 1, [len(s) for s in sequences])
    top_k = model.spec.top_k
    n_pairs = 0
    for distance, maps in fitted.ridge.items():
        assert not maps[:distance].any()
        for target in range(distance, model.spec.n_layers):
            x, y = inputs[target - distance].astype(float), logits[target].astype(float)
            chosen = np.argsort(-y, axis=1)[:, :top_k]
            expected = expected_ridge(x, y, chosen, is_held_out)
            np.testing.assert_allclose(maps[target], expected, atol=2e-2)
            n_pairs += 1
    assert n_pairs == {3: 3, 2: 1}[model.spec.n_layers]

    scores = torch.from_numpy(logits[0]).softmax(dim=-1).numpy()
    assert fitted.table_tokens.tolist() == sorted(set(ids.tolist()))
    first = next(layer for layer in hf.model.layers if hasattr(layer.mlp, "experts"))
    with torch.no_grad():
        embedded = hf.get_input_embeddings()(torch.tensor(fitted.table_tokens).long())
        prior = first.mlp.gate.weight @ first.post_attention_layernorm(embedded).T
    for token, row, of_embedding in zip(
        fitted.table_tokens, fitted.token_table, prior.T.softmax(dim=-1).numpy(), strict=True
    ):
        same = scores[ids == token]
        expected = (same.sum(axis=0) + of_embedding) / (len(same) + 1)
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_the_gate_leads_from_a_state_to_the_next_token(checkpoint):
    """Fitted to texts that it is then asked of, it beats what always says the same."""
    model = opened(checkpoint)
    fitted = fit_predictors(model, TEXTS)
    sequences = [model.encode(text) for text in TEXTS]
    _, logits, states, _ = plain_passes(checkpoint, sequences)
    with_one = [np.append(s, np.ones((len(s), 1)), axis=1) for s in states]
    scores = torch.from_numpy(logits[0]).softmax(dim=-1).numpy()
    starts = np.cumsum([0, *map(len, sequences)])
    following = np.concatenate([scores[a + 1 : b] for a, b in itertools.pairwise(starts)])
    said = torch.from_numpy(np.concatenate([s[:-1] for s in with_one]) @ fitted.last_hidden)
    always = np.log(following.mean(axis=0))
    assert -(following * said.log_softmax(dim=-1).numpy()).sum() < -(following * always).sum()


@pytest.mark.parametrize("arguments", [{"expert_memory": "60%"}, {"host_memory": "1GiB"}])
def test_where_experts_lie_changes_nothing(checkpoint, arguments):
    expected = fit_predictors(opened(checkpoint), TEXTS)
    model = opened(checkpoint, **arguments)
    config = model.config
    assert fit_predictors(model, TEXTS).fingerprint() == expected.fingerprint()
    assert model.config is config


def test_a_quantised_model_has_predictors_of_its_own(checkpoint, tmp_path):
    model = opened(checkpoint, expert_dtype="int4")
    fitted = fit_predictors(model, TEXTS)
    trace = profile(model, TEXTS, predictors=fitted, project=tmp_path)
    distances = {name: set(by_distance) for name, by_distance in trace.predictions.items()}
    later = set(range(1, model.spec.n_layers))
    assert distances == {
        "next_router": later,
        "ridge": later,
        "own_norm": {1},
        "token_embedding": {0},
        "token_table": {0},
        "last_hidden": {0},
    }
    known = recall_and_precision(trace, "token_table", 0).mean_recall[0]
    assert known > recall_and_precision(trace, "token_embedding", 0).mean_recall[0]


def test_a_kept_trace_is_found_again_only_with_the_same_predictors(checkpoint, tmp_path, capsys):
    model = opened(checkpoint)
    fitted = [fit_predictors(model, TEXTS), fit_predictors(model, TEXTS[:2])]
    ways = [{}, {"n_candidates": 1}, *({"predictors": one} for one in fitted)]
    traces = [profile(model, TEXTS, project=tmp_path, **way) for way in ways]
    assert "Reused" not in capsys.readouterr().out
    assert len({trace.fingerprint() for trace in traces}) == 4
    again = profile(model, TEXTS, project=tmp_path, **ways[2])
    assert "Reused" in capsys.readouterr().out
    assert again.fingerprint() == traces[2].fingerprint()


def test_inputs_that_are_all_alike_give_the_mean_and_no_slope():
    logits = torch.tensor([[1.0, 3.0], [3.0, 5.0], [2.0, 4.0], [2.0, 0.0]])
    held_out = torch.tensor([False, False, False, True])
    chosen = torch.ones((4, 1), dtype=torch.long)
    (fitted,) = fit_ridges(torch.full((4, 3), 0.5), [(logits, chosen)], held_out)
    np.testing.assert_allclose(fitted[:-1], 0)
    np.testing.assert_allclose(fitted[-1], [2.0, 3.0])


def test_of_one_text_the_end_is_held_out(checkpoint):
    model = opened(checkpoint)
    fitted = fit_predictors(model, TEXTS[:1])
    assert fitted.n_tokens == len(model.encode(TEXTS[0]))
    assert all(np.isfinite(maps).all() for maps in fitted.ridge.values())
    assert np.isfinite(fitted.last_hidden).all()
    assert fit_predictors(model, TEXTS[:1], max_tokens=3).n_tokens == 3


def test_a_disk_without_room_is_found_before_the_model_is_run(checkpoint, monkeypatch):
    model, seen = opened(checkpoint), []
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"Recording .* tokens takes .* MiB in .* set TMPDIR"):
        fit_predictors(model, TEXTS, progress=lambda *told: seen.append(told))
    assert not seen


def test_what_cannot_be_fitted_or_recorded_is_refused(checkpoint, tmp_path):
    model = opened(checkpoint)
    with pytest.raises(ValueError, match="a single text needs at least 3 tokens, got 2"):
        fit_predictors(model, TEXTS[:1], max_tokens=2)
    n_experts = model.spec.n_experts
    for n_candidates in (0, n_experts + 1):
        with pytest.raises(
            ValueError, match=rf"must be a whole number in 1\.\.{n_experts}, got {n_candidates}"
        ):
            profile(model, TEXTS, n_candidates=n_candidates, project=tmp_path)
    other = replace(fit_predictors(model, TEXTS[:2]), model_fingerprint="another")
    with pytest.raises(RecordError, match="fitted to a model, fingerprint another"):
        profile(model, TEXTS, predictors=other, project=tmp_path)
