"""What predictors predict, against the unmodified model's own routers, norms and states."""

import numpy as np
import pytest
import torch
from checkpoints import save_tiny_mixtral
from tiny_models import save_tiny
from torch import nn
from transformers import AutoModelForCausalLM

from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.prefetch.predictors import (
    LastHidden,
    NextRouter,
    OwnNorm,
    Ridge,
    TokenTable,
    likeliest,
    predictors_of,
)
from adapmoe_lab.models.families import UnsupportedModelError
from adapmoe_lab.models.hooks.experts_hook import served_by
from adapmoe_lab.models.hooks.input_norms import find_input_norms
from adapmoe_lab.models.hooks.key_value_cache import forward_cached
from adapmoe_lab.profiling.routing.recorder import RoutingRecorder
from adapmoe_lab.records import Predictors

IDS = torch.arange(1, 60)


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def checkpoint(request, tmp_path_factory):
    """Return a tiny checkpoint; the first layer of the qwen3_moe has no experts."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "mixtral":
        return save_tiny_mixtral(folder)
    return save_tiny("qwen3_moe", folder)


def opened(checkpoint, **arguments):
    given = {"device": "cpu", "link": "none", "dtype": "float32", **arguments}
    return load(checkpoint, announce=lambda _: None, **given)


@torch.no_grad()
def seen_in(hf, ids=IDS):
    """Return what a forward shows of each layer with experts: tensors [T, ...] by name."""
    layers = [
        layer
        for layer in hf.model.layers
        if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts")
    ]
    seen = {name: [] for name in ("norm_input", "experts_input", "logits", "output")}
    handles = []
    for layer in layers:
        norm = layer.post_attention_layernorm
        handles += [
            norm.register_forward_pre_hook(lambda _, args: seen["norm_input"].append(args[0][0])),
            layer.mlp.register_forward_pre_hook(
                lambda _, args: seen["experts_input"].append(args[0][0])
            ),
            layer.mlp.gate.register_forward_hook(lambda _, __, out: seen["logits"].append(out[0])),
            layer.register_forward_hook(
                lambda _, __, out: seen["output"].append(
                    (out if torch.is_tensor(out) else out[0])[0]
                )
            ),
        ]
    result = hf(ids[None], output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return layers, seen, result.hidden_states[-1][0]


@pytest.mark.parametrize(
    "arguments", [{}, {"expert_memory": "60%"}, {"expert_dtype": "int8", "host_memory": "1GiB"}]
)
@torch.no_grad()
def test_the_own_norm_of_the_very_layer_gives_its_routing(checkpoint, arguments):
    """Shown what layer l + 1 is given instead of what is known after layer l, nothing is left."""
    model = opened(checkpoint, **arguments)
    plain = (
        model.hf
        if "expert_dtype" in arguments
        else AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    )
    _, seen, _ = seen_in(plain)
    routers = [layer.router for layer in model.layers]
    own = OwnNorm(routers, find_input_norms(model.hf, model.layers))
    for layer in range(len(routers) - 1):
        assert list(own.targets(layer)) == [layer + 1]
        found = own.scores(layer, layer + 1, seen["norm_input"][layer + 1])
        expected = seen["logits"][layer + 1].softmax(dim=-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not own.targets(len(routers) - 1)


@torch.no_grad()
def test_what_is_recorded_equals_what_the_unmodified_model_shows(checkpoint):
    model = opened(checkpoint, expert_memory="60%")
    recorder = RoutingRecorder(model, n_candidates=3)
    with recorder.recording():
        model.hf(IDS[None])
    found = recorder.trace().predictions
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    layers, seen, _ = seen_in(plain)
    embedded = plain.get_input_embeddings()(IDS)
    expected = {("token_embedding", 0, 0): layers[0].post_attention_layernorm(embedded)}
    for target in range(1, len(layers)):
        norm = layers[target].post_attention_layernorm
        expected["own_norm", 1, target] = norm(seen["output"][target - 1])
        for distance in range(1, target + 1):
            given = seen["experts_input"][target - distance]
            expected["next_router", distance, target] = given
    for (name, distance, target), given in expected.items():
        scores = nn.functional.linear(given, layers[target].mlp.gate.weight).softmax(dim=-1)
        best = scores.topk(3)
        prediction = found[name][distance]
        np.testing.assert_array_equal(prediction.experts[:, target], best.indices)
        np.testing.assert_allclose(prediction.scores[:, target], best.values, atol=1e-3)
    named = {(name, distance) for name in found for distance in found[name]}
    assert named == {key[:2] for key in expected}
    assert (found["own_norm"][1].experts[:, 0] == -1).all()


def some_predictors(spec, seed=0):
    rng = np.random.default_rng(seed)
    shape = spec.hidden_size + 1, spec.n_experts
    return Predictors(
        model_fingerprint=spec.fingerprint(),
        ridge={
            1: rng.normal(size=(spec.n_layers, *shape)),
            2: rng.normal(size=(spec.n_layers, *shape)),
        },
        table_tokens=[3, 7, 20],
        token_table=rng.dirichlet(np.ones(spec.n_experts), 3),
        last_hidden=rng.normal(size=shape),
        n_tokens=10,
    )


def softmax(logits):
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


@torch.no_grad()
def test_fitted_predictors_compute_what_their_record_says(checkpoint):
    model = opened(checkpoint)
    fitted = some_predictors(model.spec)
    asked = {p.name: p for p in predictors_of(model.hf, model.layers, fitted)}
    x = torch.randn(5, model.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    with_one = np.append(x.numpy(), np.ones((5, 1)), axis=1)
    for distance in (1, 2):
        for target in range(distance, model.spec.n_layers):
            assert target in asked["ridge"].targets(target - distance)
            found = asked["ridge"].scores(target - distance, target, x)
            expected = softmax(with_one @ fitted.ridge[distance][target])
            np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not asked["ridge"].targets(model.spec.n_layers - 1)
    found = asked["last_hidden"].scores(0, 0, x)
    np.testing.assert_allclose(found, softmax(with_one @ fitted.last_hidden), atol=1e-5)
    assert [list(asked["last_hidden"].targets(layer)) for layer in (0, 1)] == [[0], []]


@torch.no_grad()
def test_tokens_that_the_table_lacks_are_left_to_their_embedding(checkpoint):
    model = opened(checkpoint)
    fitted = some_predictors(model.spec)
    asked = {p.name: p for p in predictors_of(model.hf, model.layers, fitted)}
    ids = torch.tensor([20, 1, 3, 200, 7])
    found = asked["token_table"].scores(0, 0, ids)
    np.testing.assert_allclose(found[[2, 4, 0]], fitted.token_table)
    by_embedding = asked["token_embedding"].scores(0, 0, ids)
    torch.testing.assert_close(found[[1, 3]], by_embedding[[1, 3]])
    alone = TokenTable(model.layers[0].router, fitted).scores(0, 0, ids)
    np.testing.assert_allclose(alone[[1, 3]], [fitted.token_table.mean(axis=0)] * 2, rtol=1e-6)


@torch.no_grad()
def test_step_by_step_every_predictor_says_what_it_says_of_the_whole_text(checkpoint):
    """Above all the last hidden state: what the forward pass before left is what counts."""
    model = opened(checkpoint)
    asked = predictors_of(model.hf, model.layers, some_predictors(model.spec))
    whole, stepwise = RoutingRecorder(model, asked), RoutingRecorder(model, asked)
    with whole.recording():
        model.hf(IDS[None])
    with stepwise.recording():
        _, past = forward_cached(model.hf, IDS[None, :50])
        for token in range(50, len(IDS)):
            _, past = forward_cached(model.hf, IDS[None, token : token + 1], past)
    expected, found = whole.trace().predictions, stepwise.trace().predictions
    assert found.keys() == expected.keys() == {p.name for p in asked}
    for name, by_distance in expected.items():
        for distance, prediction in by_distance.items():
            other = found[name][distance]
            np.testing.assert_allclose(other.scores, prediction.scores, atol=2e-3)
            assert (other.experts == prediction.experts).mean() > 0.99
    *_, states = seen_in(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
    gate = next(p for p in asked if isinstance(p, LastHidden))
    best = likeliest(gate.scores(0, 0, states[:-1]), 2)[0]
    experts = found["last_hidden"][0].experts
    assert (experts[0] == -1).all()
    assert (experts[1:, 0] == best.numpy()).mean() > 0.99


def n_hooks(model):
    return sum(len(module._forward_hooks) for module in model.hf.modules())


def test_looking_for_norms_runs_no_expert_and_leaves_no_trace(checkpoint):
    model = opened(checkpoint, expert_memory="60%")
    hooks = n_hooks(model)
    found = find_input_norms(model.hf, model.layers)
    blocks = [model.hf.get_submodule(layer.path.split(".mlp")[0]) for layer in model.layers]
    assert [id(norm) for norm in found] == [id(block.post_attention_layernorm) for block in blocks]
    traffic = model.engine.traffic
    assert (traffic.n_steps, traffic.misses.sum(), traffic.hits.sum()) == (0, 0, 0)
    assert n_hooks(model) == hooks
    with torch.no_grad():
        model.hf(IDS[None])
    assert model.engine.traffic.n_steps == 1


def test_another_executor_serves_only_meanwhile(load_tiny):
    model = load_tiny()

    class Refusing:
        def run_layer(self, *_):
            raise InterruptedError("asked")

    with pytest.raises(InterruptedError, match="asked"), served_by(model.layers, Refusing()):
        model.hf(IDS[None])
    with torch.no_grad():
        model.hf(IDS[None])
    assert model.engine.traffic.n_steps == 1


def test_a_model_without_norms_is_told_what_it_cannot_have(load_tiny):
    model = load_tiny()
    model.hf.model.layers[1].post_attention_layernorm = nn.Identity()
    message = r"experts of model\.layers\.1\.mlp\.experts are not given a norm of the residual"
    with pytest.raises(UnsupportedModelError, match=message):
        find_input_norms(model.hf, model.layers)
    fitted = some_predictors(model.spec)
    names = [p.name for p in predictors_of(model.hf, model.layers, fitted)]
    assert names == ["next_router", "ridge", "token_table", "last_hidden"]


def test_targets_stay_within_distance_and_depth(load_tiny):
    routers = [load_tiny().layers[0].router] * 6
    assert [list(NextRouter(routers).targets(layer)) for layer in (0, 3, 5)] == [
        [1, 2, 3],
        [4, 5],
        [],
    ]
    fitted = some_predictors(load_tiny().spec)
    assert [list(Ridge(routers[:3], fitted).targets(layer)) for layer in (0, 1, 2)] == [
        [1, 2],
        [2],
        [],
    ]
