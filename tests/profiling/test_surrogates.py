"""Fitted surrogates against experts that are linear, least squares, and the loss they save."""

import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import save_tiny_mixtral
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import adapmoe_lab as lab
from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.observing import observing
from adapmoe_lab.engine.store.expert_store import DiskStore
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.profiling.activations import recorded_activations
from adapmoe_lab.profiling.surrogates.fit import fit_surrogates
from adapmoe_lab.records import GatingTable, TunedConfig
from adapmoe_lab.records.files import CACHE_VARIABLE
from adapmoe_lab.records.hook_points import HookPoint


@pytest.fixture
def temporary_folder(tmp_path, monkeypatch):
    """Return where temporary files go in this test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def bytes_of_text():
    """Return texts of every kind of byte, long enough for every expert to be well known."""
    rng = np.random.default_rng(0)
    return ["".join(map(chr, rng.integers(32, 127, 250))) for _ in range(40)]


def only_the_best(model, surrogates=None):
    cuts = GatingTable.per_layer([0.0] * model.spec.n_layers, model.spec.top_k)
    return replace(TunedConfig.untuned(model.spec), gating=cuts, compensation=surrogates)


@torch.no_grad()
def passes_of(model, texts):
    """Return, layer by layer, hidden states, indices, weights and contributions of every token."""
    seen = []
    config, callbacks = TunedConfig.untuned(model.spec), {HookPoint.EXPERTS_OUTPUT: seen.append}
    with model.running(config), observing(model, callbacks):
        for text in texts:
            model.hf(model.encode(text)[None])
    for layer in range(model.spec.n_layers):
        of_layer = [one for one in seen if one.layer == layer]
        yield (
            np.concatenate([one.hidden.numpy() for one in of_layer]).astype(float),
            np.concatenate([one.indices for one in of_layer]),
            np.concatenate([one.weights for one in of_layer]).astype(float),
            np.concatenate([one.contributions.numpy() for one in of_layer]).astype(float),
        )


@torch.no_grad()
def test_linear_experts_are_recovered_exactly(tmp_path, bytes_of_text):
    """Experts without a gate whose activation is taken away: the surrogates are the experts."""
    model = load(save_tiny("nemotron_h", tmp_path), dtype="float32", device="cpu", link="none")
    for layer in model.layers:
        layer.experts.act_fn = torch.nn.Identity()
    surrogates = fit_surrogates(model, bytes_of_text, rank=48)
    ids = model.encode("A text that nothing was fitted on.")[None]
    expected = model.hf(ids).logits
    with model.running(only_the_best(model)):
        without = (model.hf(ids).logits - expected).abs().max()
    with model.running(only_the_best(model, surrogates)):
        torch.testing.assert_close(model.hf(ids).logits, expected, rtol=1e-3, atol=1e-3)
        assert without > 0.05
    assert np.abs(surrogates.gain).max() < 1e-3
    store = model.store
    for expert in range(8):
        weights = store.views(0, expert, store.buffer(0, expert))
        product = weights["down_proj"] @ weights["up_proj"]
        found = surrogates.up[0][expert] @ surrogates.down[0][expert]
        np.testing.assert_allclose(found, product.numpy(), atol=2e-3)


def save_family(family, folder, top_k):
    if family == "mixtral":
        return save_tiny_mixtral(folder, n_experts=6, top_k=top_k)
    return save_tiny(family, folder)


@pytest.mark.parametrize(
    ("family", "top_k", "expert_dtype"),
    [
        ("mixtral", 2, "int4"),
        ("mixtral", 4, "float32"),
        ("gpt_oss", 2, "float32"),
        ("olmoe", 2, "int8"),
        ("deepseek_v3", 2, "float32"),
    ],
)
def test_mean_and_gain_are_least_squares_of_what_ran(
    tmp_path, bytes_of_text, family, top_k, expert_dtype
):
    """Rank 0, where everything can be said in a few lines of numpy."""
    folder = save_family(family, tmp_path, top_k)
    model = load(folder, dtype="float32", expert_dtype=expert_dtype, device="cpu", link="none")
    found = fit_surrogates(model, bytes_of_text, rank=0)
    for layer, (_, indices, weights, contributions) in enumerate(passes_of(model, bytes_of_text)):
        rows = np.arange(len(weights))
        best = weights.argmax(axis=1)
        skipped = np.ones(weights.shape, dtype=bool)
        skipped[rows, best] = False
        stand_in = np.zeros(contributions.shape)
        for expert in range(model.spec.n_experts):
            here = (indices == expert) & skipped
            mean = (weights[here, None] * contributions[here]).sum(0) / (weights[here] ** 2).sum()
            offset = found.offset[layer][expert].astype(float)
            shrunk = np.linalg.norm(offset) / np.linalg.norm(mean)
            assert 0.8 < shrunk <= 1
            np.testing.assert_allclose(offset, shrunk * mean, atol=1e-5)
            stand_in[here] = weights[here, None] * offset
        kept = (
            contributions[rows, best] * ((weights * skipped).sum(1) / weights[rows, best])[:, None]
        )
        left = ((contributions - stand_in) * skipped[:, :, None]).sum(axis=1)
        gain = np.linalg.lstsq(kept.reshape(-1, 1), left.ravel(), rcond=None)[0][0]
        assert found.gain[layer] == pytest.approx(gain, rel=1e-3)
    assert found.ranks == (0,) * model.spec.n_layers


def test_gain_beside_maps_is_least_squares_of_what_they_leave(load_tiny, bytes_of_text):
    model = load_tiny()
    found = fit_surrogates(model, bytes_of_text[:10], rank=3)
    without = fit_surrogates(model, bytes_of_text[:10], rank=3, fit_gain=False)
    assert not without.gain.any()
    np.testing.assert_array_equal(without.up[1], found.up[1])
    for layer, seen in enumerate(passes_of(model, bytes_of_text[:10])):
        hidden, indices, weights, contributions = seen
        rows, best = np.arange(len(weights)), weights.argmax(axis=1)
        second, share = indices[rows, 1 - best], weights[rows, 1 - best]
        down, up = found.down[layer][second], found.up[layer][second]
        maps = np.einsum("ndr,nrc,nc->nd", up, down, hidden) + found.offset[layer][second]
        left = contributions[rows, 1 - best] - share[:, None] * maps
        kept = contributions[rows, best] * (share / weights[rows, best])[:, None]
        gain = np.linalg.lstsq(kept.reshape(-1, 1), left.ravel(), rcond=None)[0][0]
        assert found.gain[layer] == pytest.approx(gain, rel=1e-3, abs=1e-5)


def test_gradients_are_those_of_the_unmodified_model(tiny_checkpoint, load_tiny, texts):
    model = load_tiny()
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    outputs = [[] for _ in plain.model.layers]

    def keep(layer):
        def hook(_, __, output):
            output.retain_grad()
            outputs[layer].append(output)

        return hook

    for layer, block in enumerate(plain.model.layers):
        block.mlp.experts.register_forward_hook(keep(layer))
    for text in texts:
        ids = model.encode(text)[None]
        (plain(ids, labels=ids).loss * (ids.shape[1] - 1)).backward()
    sequences = [model.encode(text) for text in texts]
    with recorded_activations(model, sequences, gradients=True) as activations:
        for layer, of_layer in enumerate(outputs):
            expected = torch.cat([output.grad for output in of_layer])
            found = activations.layer(layer).gradient
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_same_from_memory_and_from_disk(load_tiny, texts, tmp_path, monkeypatch, dtype):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    on_disk = load_tiny(host_memory="60%", dtype=dtype)
    assert isinstance(on_disk.store, DiskStore)
    fitted = [
        fit_surrogates(model, texts, rank=4, gradient_weighted=True)
        for model in (load_tiny(dtype=dtype), on_disk)
    ]
    assert fitted[0].fingerprint() == fitted[1].fingerprint()
    assert fitted[0].n_tokens == sum(map(len, texts))
    assert fitted[0].gradient_weighted


def test_cache_gating_and_compensation_play_no_part(load_tiny, texts):
    model = load_tiny()
    fitted = fit_surrogates(model, texts, rank=2)
    config = replace(only_the_best(model, fitted), plan=slots_plan(model.spec, 1))
    model.apply(config)
    again = fit_surrogates(model, texts, rank=2)
    assert again.fingerprint() == fitted.fingerprint()
    assert model.config is config
    assert model.engine.plan.slots[0] == 1


@pytest.mark.parametrize("stop_at", ["recording activations", "fitting surrogates"])
def test_an_interrupt_leaves_nothing_behind(load_tiny, texts, temporary_folder, stop_at):
    model = load_tiny()
    before = model.config
    files = []

    def stop(done, total, text):
        assert 0 <= done < total
        files.append(len(list(temporary_folder.rglob("*.hidden"))))
        if text == stop_at and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_surrogates(model, texts, progress=stop)
    assert max(files) == 3
    assert not list(temporary_folder.iterdir())
    assert model.config is before
    assert model.engine.plan.slots[0] == 4


def test_a_budget_goes_where_it_is_worth_most(load_tiny, texts):
    model = load_tiny()
    spec = model.spec
    even = fit_surrogates(model, texts, rank=4)
    by_worth = fit_surrogates(model, texts, budget_bytes=even.n_bytes(4))
    assert by_worth.n_bytes(4) == even.n_bytes(4)
    assert len(set(by_worth.ranks)) > 1
    shared = min(by_worth.ranks[0], 4)
    wide = fit_surrogates(model, texts, rank=by_worth.ranks[0])
    np.testing.assert_array_equal(by_worth.down[0][:, :shared], wide.down[0][:, :shared])
    np.testing.assert_array_equal(by_worth.offset[0], wide.offset[0])
    share = even.n_bytes(4) / spec.all_experts_bytes
    assert fit_surrogates(model, texts, budget_bytes=f"{100 * share:.6f}%").ranks == by_worth.ranks


def test_what_cannot_be_fitted_is_refused(load_tiny, texts, tmp_path):
    model = load_tiny()
    with pytest.raises(ValueError, match=r"rank must be a whole number in 0\.\.32, got 33"):
        fit_surrogates(model, texts, rank=33)
    with pytest.raises(ValueError, match="either rank or budget_bytes"):
        fit_surrogates(model, texts, rank=3, budget_bytes="2%")
    with pytest.raises(ValueError, match=r"100 bytes do not hold the least .* take 1536 by"):
        fit_surrogates(model, texts, budget_bytes=100)
    with pytest.raises(ValueError, match="budget_bytes='much' is not a size"):
        fit_surrogates(model, texts, budget_bytes="much")
    switch = load(save_tiny_mixtral(tmp_path, top_k=1), device="cpu", link="none")
    with pytest.raises(ValueError, match="routes every token to one expert; none can be skipped"):
        fit_surrogates(switch, texts)


@pytest.mark.slow
def test_the_demo_loses_less_with_surrogates():
    """On texts nothing was fitted on, every second expert skipped."""
    model = lab.load("demo", dtype="float32", device="cpu", link="none", announce=lambda _: None)
    texts = lab.calibration_texts()
    surrogates = lab.fit_surrogates(
        model, texts[:24], rank=16, gradient_weighted=True, max_tokens=256
    )
    reports = [
        lab.evaluate_loss(model, config, texts[24:72], max_tokens=256)
        for config in (
            TunedConfig.untuned(model.spec),
            only_the_best(model),
            only_the_best(model, surrogates),
        )
    ]
    without, _ = reports[1].increase_over(reports[0])
    saved, error = reports[1].increase_over(reports[2])
    assert saved > 0.2 * without
    assert saved > 3 * error
