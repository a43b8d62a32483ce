"""Sensitivity against finite differences, brute force, and itself under other residency."""

import numpy as np
import pytest
import torch
from drawn_surrogates import random_surrogates
from transformers import AutoModelForCausalLM

from adapmoe_lab.evaluation.loss import evaluate_loss
from adapmoe_lab.models.hooks.recomputing import recomputing_layers
from adapmoe_lab.profiling.sensitivity.sensitivity import sensitivities, sensitivity
from adapmoe_lab.records import OFF, GatingTable, TunedConfig

TEXT = "abc def"


def finite_difference_fisher(checkpoint, ids, step=3e-3):
    """Return mean over tokens of ||dL/dy_l||^2 [L], one central difference per output value.

    The norms of transformers compute in float32 whatever the model's dtype: a smaller step would
    measure their rounding.
    """
    hf = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    hf.set_experts_implementation("eager")
    n_layers, width, n_tokens = len(hf.model.layers), hf.config.hidden_size, len(ids)
    nudges = torch.zeros(2 * width, n_tokens, width, dtype=torch.float64)  # one per sequence
    where = {"layer": -1}
    for number, layer in enumerate(hf.model.layers):

        def add(_, __, output, number=number):
            return output + nudges.view_as(output) if where["layer"] == number else output

        layer.mlp.experts.register_forward_hook(add)

    @torch.no_grad()
    def losses():
        logits = hf(ids.repeat(2 * width, 1)).logits[:, :-1]
        following = ids[1:].repeat(2 * width, 1)
        return torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), following, reduction="none"
        ).sum(1)

    squares = np.zeros(n_layers)
    for layer in range(n_layers):
        where["layer"] = layer
        for token in range(n_tokens):
            nudges.zero_()
            nudges[:width, token] = step * torch.eye(width, dtype=torch.float64)
            nudges[width:, token] = -step * torch.eye(width, dtype=torch.float64)
            above, below = losses().split(width)
            squares[layer] += float((((above - below) / (2 * step)) ** 2).sum())
    return squares / n_tokens


def test_fisher_equals_finite_differences(tiny_checkpoint, load_tiny):
    model = load_tiny()
    profile = sensitivity(model, [TEXT], anchored=False)
    expected = finite_difference_fisher(tiny_checkpoint, model.encode(TEXT))
    np.testing.assert_allclose(profile.fisher, expected, rtol=1e-3)
    assert profile.n_tokens == len(TEXT)


def test_cache_and_gating_play_no_part(load_tiny, texts):
    model = load_tiny()
    expected = sensitivity(model, texts, anchored=False)
    model.apply(TunedConfig(
        model=TunedConfig.model_identity(model.spec),
        gating=GatingTable.per_layer([0.6] * 3, 2),
    ))  # fmt: skip
    again = sensitivity(model, texts, anchored=False)
    np.testing.assert_allclose(again.cost, expected.cost, rtol=1e-6)
    assert model.config.gating is not None


def test_standard_errors_are_over_sequences(load_tiny, texts):
    model = load_tiny()
    whole = sensitivity(model, texts, anchored=False)
    parts = [sensitivity(model, [text], anchored=False) for text in texts]
    n_tokens = np.array([part.n_tokens for part in parts])
    costs = np.array([part.fisher for part in parts])
    np.testing.assert_allclose(whole.fisher, (n_tokens @ costs) / n_tokens.sum(), rtol=1e-6)
    n = len(texts)
    left_out = np.array([
        np.delete(n_tokens, i) @ np.delete(costs, i, axis=0) / np.delete(n_tokens, i).sum()
        for i in range(n)
    ])  # fmt: skip
    spread = ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0)
    np.testing.assert_allclose(whole.fisher_se, np.sqrt(spread * (n - 1) / n), rtol=1e-6)
    assert np.isnan(parts[0].fisher_se).all()


@pytest.mark.parametrize("stand_in", ["nothing", "renormalised", "surrogates"])
def test_estimates_equal_a_plain_computation_from_the_unmodified_model(
    tiny_checkpoint, load_tiny, stand_in
):
    """Gradients and expert outputs of plain transformers, and every token on its own."""
    model = load_tiny()
    surrogates, gain = None, float(stand_in == "renormalised")
    if stand_in == "surrogates":
        gain = 0.5
        surrogates = random_surrogates(model.spec, gain=[gain] * 3)
    found = sensitivities(
        model, [TEXT], ["fisher", "fisher-change", "directional", "second-order"],
        renormalise=stand_in == "renormalised", compensation=surrogates, anchored=False,
    )  # fmt: skip
    hf = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    hf.set_experts_implementation("eager")
    ids = model.encode(TEXT)
    outputs, routed = {}, {}
    for number, layer in enumerate(hf.model.layers):

        def keep_output(module, inputs, output, number=number):
            output.retain_grad()
            outputs[number], routed[number] = output, (module, *inputs)

        layer.mlp.experts.register_forward_hook(keep_output)
    logits = hf(ids[None]).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
    for number in range(3):
        gradient = outputs[number].grad.detach().double()
        module, hidden, index, weights = (
            value.detach() if isinstance(value, torch.Tensor) else value for value in routed[number]
        )
        estimates = dict.fromkeys(found, 0.0)
        change_squared = 0.0
        cut_number = 10
        cut = found["fisher"].cuts[cut_number]
        for t in range(len(ids)):
            parts = [
                module(
                    hidden[t : t + 1], index[t : t + 1, k : k + 1], weights[t : t + 1, k : k + 1]
                )[0]
                .detach()
                .double()
                for k in range(2)
            ]
            best, other = (0, 1) if weights[t, 0] >= weights[t, 1] else (1, 0)
            share = float(weights[t, best] / weights[t].sum())
            if share < cut:
                continue
            change = gain * (1 - share) / share * parts[best] - parts[other]
            if surrogates is not None:
                expert, x = int(index[t, other]), hidden[t].numpy()
                down, up = surrogates.down[number][expert], surrogates.up[number][expert]
                map_of_x = surrogates.offset[number][expert] + up @ (down @ x)
                change = change + weights[t, other].double() * torch.from_numpy(map_of_x).double()
            along = float(gradient[t] @ change)
            estimates["fisher"] += (1 - share) ** 2
            change_squared += float(change @ change)
            estimates["directional"] += along**2 / 2
            estimates["second-order"] += along + along**2 / 2
        fisher = float((gradient**2).sum(dim=1).mean())
        estimates["fisher"] *= fisher
        estimates["fisher-change"] = fisher * change_squared / (2 * hidden.shape[1])
        for name, total in estimates.items():
            got = found[name].increase_nats[number, cut_number]
            assert got == pytest.approx(total / len(ids), rel=2e-3, abs=1e-9), name


def test_ablation_is_the_measured_difference_of_two_runs(load_tiny, texts):
    model = load_tiny()
    profile = sensitivity(model, texts, estimator="ablation", anchored=False)
    baseline = evaluate_loss(model, TunedConfig.untuned(model.spec), texts)
    cuts = np.full(3, OFF)
    cuts[1] = profile.cuts[0]
    skipping = TunedConfig(
        model=TunedConfig.model_identity(model.spec), gating=GatingTable.per_layer(cuts, 2)
    )
    increase, _ = evaluate_loss(model, skipping, texts).increase_over(baseline)
    assert profile.increase_nats[1, 0] == pytest.approx(increase, rel=1e-3)
    assert profile.increase(cuts)[0][[0, 2]].tolist() == [0, 0]


def test_divergence_is_that_of_the_two_distributions(load_tiny, texts):
    model = load_tiny()
    profile = sensitivity(model, texts[:1], estimator="divergence", anchored=False)
    ids = model.encode(texts[0])[None]
    table = GatingTable.per_layer([OFF, OFF, profile.cuts[2]], 2)
    with torch.no_grad():
        whole = torch.distributions.Categorical(logits=model.hf(ids).logits[0, :-1])
        with model.engine.gated_by(table):
            gated = torch.distributions.Categorical(logits=model.hf(ids).logits[0, :-1])
    expected = float(torch.distributions.kl_divergence(whole, gated).mean())
    assert profile.increase_nats[2, 2] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("estimator", ["directional", "fisher"])
def test_what_an_anchored_profile_predicts_at_its_anchors_was_measured_there(
    load_tiny, texts, estimator
):
    """Loss increase and standard error are those of an ungated and a gated evaluation."""
    model = load_tiny()
    profile = sensitivity(model, texts, estimator=estimator)
    baseline = evaluate_loss(model, TunedConfig.untuned(model.spec), texts)
    for cut in anchor_cuts(profile):
        table = GatingTable.per_layer(np.full(3, cut), 2)
        config = TunedConfig(model=TunedConfig.model_identity(model.spec), gating=table)
        increase, error = evaluate_loss(model, config, texts).increase_over(baseline)
        found, found_se = profile.total_increase(table.cuts[:, 0])
        assert found == pytest.approx(increase, rel=1e-3)
        assert found_se == pytest.approx(error, rel=0.05)
        assert profile.increase(table.cuts[:, 0])[0].sum() == pytest.approx(found)


def test_anchors_complete_the_curves_and_lie_where_budgets_do(load_tiny, texts):
    model = load_tiny()
    raw = sensitivity(model, texts, anchored=False)
    profile = sensitivity(model, texts)
    np.testing.assert_allclose(profile.increase_nats, raw.increase_nats)
    assert raw.correction(1.0) == (1.0, 1.0)
    assert profile.total_increase(np.full(3, OFF)) == (0, 0)
    skipped = [
        np.mean([np.interp(cut, profile.cuts, row) for row in profile.skipped])
        for cut in anchor_cuts(profile)
    ]
    assert skipped == pytest.approx([0.1, 0.2, 0.3, 0.45], abs=1e-6)


def test_the_first_order_part_is_what_two_estimators_differ_by(load_tiny, texts):
    profiles = sensitivities(load_tiny(), texts, ["directional", "second-order", "ablation"])
    without, whole, measured = profiles.values()
    assert np.abs(without.first_order[:, :-1]).min() > 0
    difference = whole.increase_nats - without.increase_nats
    np.testing.assert_allclose(without.first_order, difference, rtol=1e-9, atol=1e-15)
    assert not whole.first_order.any()
    assert not measured.first_order.any()


def anchor_cuts(profile):
    """Return the one cut of all layers at which the curves add up to each anchor's estimate."""
    sums = profile.increase_nats.sum(axis=0)[::-1]  # ascends where cuts descend
    return np.interp(profile.anchors[:, 0], sums, profile.cuts[::-1])


def test_one_slot_per_layer_gives_the_resident_result(load_tiny, texts):
    resident = sensitivity(load_tiny(), texts)
    offloaded = sensitivity(load_tiny(expert_memory="45%"), texts)
    np.testing.assert_allclose(offloaded.fisher, resident.fisher, rtol=1e-4)
    np.testing.assert_allclose(offloaded.increase_nats, resident.increase_nats, rtol=1e-4)


@pytest.mark.parametrize("expert_dtype", ["int8", "int4", "mxfp4"])
def test_quantised_stores_have_the_sensitivity_of_their_dequantised_weights(
    tiny_checkpoint, load_tiny, expert_dtype
):
    packed = load_tiny(expert_dtype=expert_dtype)
    found = sensitivity(packed, [TEXT], anchored=False).fisher
    hf = load_tiny(expert_dtype=expert_dtype).detach()  # plain transformers, dequantised experts
    ids, gradients = packed.encode(TEXT), {}
    for number, layer in enumerate(hf.model.layers):

        def keep_output(_, __, output, number=number):
            output.retain_grad()
            gradients[number] = output

        layer.mlp.experts.register_forward_hook(keep_output)
    embedded = hf.get_input_embeddings()(ids[None]).detach().requires_grad_()
    logits = hf(inputs_embeds=embedded).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
    expected = [float((gradients[n].grad ** 2).sum(1).mean()) for n in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_recomputing_leaves_the_layers_as_they_were(load_tiny):
    model = load_tiny()
    modules = list(model.hf.modules())
    before = [dict(vars(module)) for module in modules]

    def is_as_before():
        return all(vars(m).keys() == was.keys() and m.training == was["training"]
                   for m, was in zip(modules, before, strict=True))  # fmt: skip

    with recomputing_layers(model.hf):
        assert not is_as_before()
        assert not any(m.training for m in modules if isinstance(m, torch.nn.Linear))
    assert is_as_before()


def test_an_unknown_estimator_is_refused(load_tiny, texts):
    with pytest.raises(ValueError, match="estimator='hessian' is unknown; expected one of fisher,"):
        sensitivity(load_tiny(), texts, estimator="hessian")


def test_what_a_text_must_have(load_tiny):
    with pytest.raises(ValueError, match="at least two tokens each; text 0 is shorter"):
        sensitivity(load_tiny(), ["a"])


def test_loss_equals_the_unmodified_model(tiny_checkpoint, load_tiny, texts):
    model, plain = load_tiny(), AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    report = evaluate_loss(model, None, texts)
    for text, nats in zip(texts, report.nats, strict=True):
        ids = model.encode(text)[None]
        with torch.no_grad():
            mean = float(plain(ids, labels=ids).loss)
        assert nats == pytest.approx(mean * (ids.shape[1] - 1), rel=1e-5)
    assert report.skipped_fraction == 0.0
