"""Observing shows a model's passes as they are, and leaves the model as it was."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from adapmoe_lab.engine.observing import observing
from adapmoe_lab.models.hooks.key_value_cache import forward_cached
from adapmoe_lab.models.hooks.observing import OF_EXPERTS
from adapmoe_lab.models.hooks.recomputing import recomputing_layers
from adapmoe_lab.records.hook_points import HookPoint

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
HOOK_TABLES = [name for name in vars(nn.Module()) if name.endswith("hooks")]


def recording(seen, points=HookPoint):
    """Return callbacks that append (hook point, what it was given)."""
    return {point: (lambda *given, p=point: seen.append((p, given))) for point in points}


def hooks_of(hf):
    """Return how many hooks of every kind every module has."""
    tables = [(m, name) for m in hf.modules() for name in HOOK_TABLES]
    return [len(getattr(module, name)) for module, name in tables]


@torch.no_grad()
def test_every_point_shows_what_transformers_itself_computes(load_tiny):
    model, seen = load_tiny(), []
    with observing(model, recording(seen)):
        output = model.hf(IDS, output_hidden_states=True)
    of_layer = [HookPoint.EXPERTS_INPUT, HookPoint.EXPERTS_OUTPUT, HookPoint.LAYER_OUTPUT]
    assert [p for p, _ in seen] == [HookPoint.TOKEN, *of_layer * 3, HookPoint.LAST_HIDDEN]
    token_ids, cache = seen[0][1]
    assert (token_ids.tolist(), cache) == (IDS.tolist(), None)
    flat = [states.flatten(0, 1) for states in output.hidden_states]
    for layer in range(3):
        (_, given), (_, (passed,)), (_, done) = seen[1 + 3 * layer : 4 + 3 * layer]
        assert given[0] == passed.layer == done[0] == layer
        assert torch.equal(given[1], passed.hidden)
        if layer < 2:  # the last of hidden_states is behind the model's norm
            assert torch.equal(done[1], flat[layer + 1])
    (last_hidden,) = seen[-1][1]
    assert torch.equal(last_hidden, flat[-1])
    assert torch.equal(model.hf.lm_head(last_hidden), output.logits.flatten(0, 1))


@torch.no_grad()
def test_a_pass_that_goes_on_shows_its_cache(load_tiny):
    model, seen = load_tiny(), []
    _, cache = forward_cached(model.hf, IDS[:1])
    with observing(model, recording(seen, [HookPoint.TOKEN])):
        forward_cached(model.hf, IDS[1:, :2], cache)
        model.hf(inputs_embeds=model.hf.get_input_embeddings()(IDS))
    [(_, (token_ids, continued))] = seen
    assert token_ids.tolist() == [[9, 2]]
    assert continued is cache


def test_gradients_come_from_the_last_layer_to_the_first(load_tiny):
    model, seen = load_tiny(), []
    model.hf.requires_grad_(False)
    embedded = model.hf.get_input_embeddings()(IDS[:1]).requires_grad_()
    with observing(model, recording(seen, [HookPoint.EXPERTS_GRADIENT])):
        with recomputing_layers(model.hf):
            loss = model.hf(inputs_embeds=embedded).logits.logsumexp(-1).sum()
        loss.backward()
    assert [found.layer for _, (found,) in seen] == [2, 1, 0]
    assert all(found.gradient.shape == (5, 32) for _, (found,) in seen), seen[0][1][
        0
    ].gradient.shape


@torch.no_grad()
def test_blocks_nest_and_leave_nothing_behind(load_tiny):
    model, outer, inner = load_tiny(), [], []
    before = hooks_of(model.hf)
    with observing(model, recording(outer)):
        with observing(model, recording(inner)):
            model.hf(IDS)
        assert len(inner) == len(outer) == 11
        model.hf(IDS)
    assert len(inner) == 11
    assert len(outer) == 22
    model.hf(IDS)
    assert len(outer) == 22
    assert hooks_of(model.hf) == before


@torch.no_grad()
@pytest.mark.parametrize("point", [p for p in HookPoint if p is not HookPoint.EXPERTS_GRADIENT])
def test_what_a_callback_raises_ends_the_pass_and_the_model_is_as_before(load_tiny, point):
    model = load_tiny()
    before, expected = hooks_of(model.hf), model.hf(IDS).logits

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), observing(model, {**recording([]), point: stop}):
        model.hf(IDS)
    assert hooks_of(model.hf) == before
    assert torch.equal(model.hf(IDS).logits, expected)


@torch.no_grad()
def test_a_plain_model_shows_the_points_that_lie_outside_its_experts(tiny_checkpoint):
    hf, seen = AutoModelForCausalLM.from_pretrained(tiny_checkpoint), []
    before = hooks_of(hf)
    with observing(hf, recording(seen, set(HookPoint) - set(OF_EXPERTS))):
        hf(IDS)
    assert [layer for point, (layer, *_) in seen if point is HookPoint.LAYER_OUTPUT] == [0, 1, 2]
    assert hooks_of(hf) == before
    with (
        pytest.raises(ValueError, match=r"EXPERTS_OUTPUT is seen only where this project runs"),
        observing(hf, recording(seen)),
    ):
        pass
    assert hooks_of(hf) == before


def test_a_key_that_is_no_hook_point_is_refused(load_tiny):
    with (
        pytest.raises(ValueError, match=r"'logits' is no hook point.*HookPoint.TOKEN"),
        observing(load_tiny(), {"logits": print}),
    ):
        pass
