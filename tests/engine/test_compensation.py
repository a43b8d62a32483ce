"""What replaces dropped experts, against the formula written out on the unmodified model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import save_tiny_mixtral
from drawn_surrogates import compensate, compensated_output, random_cuts, random_surrogates
from runs import decode
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.store.expert_store import DiskStore
from adapmoe_lab.evaluation.latency import measure_latency
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.profiling.routing.profile import profile
from adapmoe_lab.records import GatingTable, RecordError, Surrogates, TunedConfig
from adapmoe_lab.records.files import CACHE_VARIABLE

PROMPT = "Once upon a time there was a king who"
IDS = torch.arange(1, 60)[None]


def compensated(model, cuts=None, surrogates=None, slots=None):
    spec = model.spec
    return replace(
        TunedConfig.untuned(spec),
        gating=cuts if cuts is not None else random_cuts(spec),
        compensation=surrogates if surrogates is not None else random_surrogates(spec),
        plan=slots_plan(spec, slots) if slots is not None else None,
    )


def assert_equals_the_formula(folder, model):
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain_ids = model.encode(PROMPT)
    config = model.config
    compensate(plain, model.spec.layer_paths, config.gating.cuts, config.compensation)
    with torch.no_grad():
        expected = plain(plain_ids[None]).logits
        torch.testing.assert_close(model.hf(plain_ids[None]).logits, expected, rtol=1e-4, atol=1e-5)
        assert decode(model.hf, plain_ids, 8) == decode(plain, plain_ids, 8)
    assert model.engine.traffic.skipped > 0


@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize(("top_k", "n_experts"), [(2, 4), (4, 8), (8, 10)])
def test_equals_the_formula_for_any_number_of_experts(tmp_path, top_k, n_experts, slots):
    folder = save_tiny_mixtral(tmp_path, n_experts=n_experts, top_k=top_k)
    model = load(folder, device="cpu", link="none")
    model.apply(compensated(model, slots=slots))
    assert_equals_the_formula(folder, model)


@pytest.mark.parametrize("family", ["gpt_oss", "olmoe", "deepseek_v3", "jamba", "nemotron_h"])
def test_equals_the_formula_for_a_family(tmp_path, family):
    """Biases and transposed weights; unnormalised routers; sums of 2.5; dense layers; no gate."""
    folder = save_tiny(family, tmp_path)
    model = load(folder, dtype="float32", device="cpu", link="none")
    model.apply(compensated(model))
    assert_equals_the_formula(folder, model)


@torch.no_grad()
def test_experts_on_disk_give_the_same(tiny_checkpoint, load_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    in_memory, on_disk = load_tiny(), load_tiny(host_memory="60%")
    assert isinstance(on_disk.store, DiskStore)
    on_disk.apply(compensated(on_disk, slots=1))
    assert_equals_the_formula(tiny_checkpoint, on_disk)
    in_memory.apply(compensated(in_memory, slots=4))
    assert torch.equal(in_memory.hf(IDS).logits, on_disk.hf(IDS).logits)


@torch.no_grad()
def test_packed_experts_are_compensated_as_their_plain_selves(load_tiny):
    model = load_tiny(expert_dtype="int4", dtype="float32")
    config = compensated(model)
    model.apply(config)
    logits, paths = model.hf(IDS).logits, model.spec.layer_paths
    plain = model.detach()
    compensate(plain, paths, config.gating.cuts, config.compensation)
    torch.testing.assert_close(logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_gain_of_one_and_nothing_else_renormalises(load_tiny):
    model = load_tiny()
    cuts = GatingTable.per_layer([0.6, 0.7, 0.8], 2)
    model.apply(compensated(model, cuts, Surrogates.scaling(model.spec, 1.0)))
    scaled = model.hf(IDS).logits
    with model.running(
        replace(TunedConfig.untuned(model.spec), gating=replace(cuts, renormalise=True))
    ):
        torch.testing.assert_close(model.hf(IDS).logits, scaled, rtol=1e-5, atol=1e-5)
    model.apply(compensated(model, cuts, Surrogates.scaling(model.spec, 0.0)))
    unchanged = model.hf(IDS).logits
    with model.running(replace(TunedConfig.untuned(model.spec), gating=cuts)):
        assert torch.equal(model.hf(IDS).logits, unchanged)
    assert not torch.allclose(unchanged, scaled, atol=1e-3)


@torch.no_grad()
def test_nothing_changes_where_nothing_is_dropped(load_tiny):
    model = load_tiny()
    expected = model.hf(IDS).logits
    for cuts in (None, GatingTable.per_layer([2.0] * 3, 2)):
        model.apply(replace(compensated(model), gating=cuts))
        assert torch.equal(model.hf(IDS).logits, expected)


@torch.no_grad()
def test_no_expert_is_neither_kept_nor_dropped(load_tiny):
    """The router's mark E, with a weight of its own that must count for nothing."""
    model = load_tiny()
    model.apply(compensated(model, GatingTable.per_layer([0.5] * 3, 2)))
    layer, experts = 1, model.layers[1].experts
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 1], [4, 2], [3, 4], [2, 3], [1, 0]])
    weights = torch.tensor([[0.6, 0.4], [0.0, 0.7], [0.3, 0.0], [0.5, 0.5], [0.2, 0.8]])
    found = model.engine.run_layer(layer, experts, hidden, index, weights)
    model.detach()
    cuts, surrogates = model.config.gating.cuts[layer], model.config.compensation
    original = type(experts).forward
    expected = compensated_output(
        experts, original, (hidden, index, weights), cuts, surrogates, layer
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_input_through_the_surrogates(load_tiny):
    """What the second expert's surrogate adds is linear in the input, so its gradient is known."""
    model = load_tiny()
    surrogates = random_surrogates(model.spec, ranks=[2] * 3, gain=[0.0] * 3)
    model.apply(compensated(model, GatingTable.per_layer([0.0] * 3, 2), surrogates))
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def output(index, weights):
        routed = torch.tensor([index]), torch.tensor([weights])
        return model.engine.run_layer(0, model.layers[0].experts, hidden, *routed)

    added = output([1, 2], [0.6, 0.4]) - output([1, 4], [0.6, 0.0])
    (gradient,) = torch.autograd.grad(added.sum(), hidden)
    expected = 0.4 * (surrogates.up[0][2] @ surrogates.down[0][2]).sum(axis=0)
    np.testing.assert_allclose(gradient[0].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_as_close_as_its_own_rounding(tmp_path):
    folder = save_tiny_mixtral(tmp_path, n_experts=8, top_k=4)
    exact = load(folder, dtype="float32", device="cpu", link="none")
    rounded = load(folder, dtype="bfloat16", device="cpu", link="none")
    surrogates = random_surrogates(exact.spec, gain=[0.5] * 3)
    rng = np.random.default_rng(0)
    routing = (
        np.array([rng.permutation(8)[:4] for _ in range(20)]),
        rng.dirichlet(np.ones(4), 20).astype(np.float32),
    )
    keep = np.zeros((20, 4), dtype=bool)
    keep[np.arange(20), routing[1].argmax(axis=1)] = True
    hidden, kept = torch.from_numpy(rng.normal(size=(2, 20, 32))).float()
    outputs = []
    for model in (exact, rounded):
        model.engine.configure(None, slots_plan(model.spec, 0), surrogates=surrogates)
        given = hidden.to(model.hf.dtype)
        outputs.append(model.engine._skipping.outputs.complete(2, given, kept, routing, keep))
    error = (outputs[1].float() - outputs[0]).norm() / outputs[0].norm()
    assert error < 0.01


def test_it_stays_on_the_device_until_others_take_its_place(load_tiny):
    model = load_tiny()
    second = compensated(model, surrogates=random_surrogates(model.spec, seed=1))
    model.apply(compensated(model))
    resident = model.engine._skipping.outputs
    with model.running():
        assert model.engine._skipping.outputs is resident
    model.apply(second)
    assert model.engine._skipping.outputs is not resident
    model.apply(TunedConfig.untuned(model.spec))
    assert model.engine._skipping.outputs is None


def test_traces_and_measurements_say_what_they_were_taken_under(load_tiny, tmp_path):
    model = load_tiny()
    gated = replace(compensated(model), compensation=None)
    fitted = [random_surrogates(model.spec, seed=seed) for seed in (0, 1)]
    configs = [gated, *(compensated(model, surrogates=one) for one in fitted)]
    under, fingerprints = [], []
    for config in configs:
        with model.running(config):
            trace = profile(model, [PROMPT], project=tmp_path)
        under.append(trace.recorded_under)
        report = measure_latency(model, config, [PROMPT], new_tokens=2, repeats=1)
        fingerprints.append(report.decode.conditions["compensation"])
    assert len(set(under)) == 3
    assert under[0] == gated.gating.fingerprint()
    assert fingerprints == [None, *(one.fingerprint() for one in fitted)]


def test_another_models_surrogates_are_refused(load_tiny, tmp_path):
    other = load(save_tiny_mixtral(tmp_path, seed=1), device="cpu", link="none")
    with pytest.raises(RecordError, match="Fit surrogates to this model"):
        compensated(load_tiny(), surrogates=random_surrogates(other.spec))


@torch.no_grad()
def test_a_saved_config_runs_as_it_was_tuned(load_tiny, tmp_path):
    model = load_tiny()
    model.apply(compensated(model, slots=2))
    said = []
    path = model.config.save(tmp_path / "tuned.json")
    again = load_tiny(config=path, announce=said.append)
    assert torch.equal(again.hf(IDS).logits, model.hf(IDS).logits)
    n_bytes = model.config.compensation.n_bytes(4)
    assert again.memory.surrogate_bytes == n_bytes
    assert f"surrogates: {n_bytes / 2**20:.1f}MiB; all experts:" in said[0]
    resident = again.engine._skipping.outputs
    assert (
        sum(t.numel() * 4 for t in (*resident._down, *resident._up, *resident._offset)) == n_bytes
    )
