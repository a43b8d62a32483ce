"""Routing that is given instead of computed, so that two executors choose the same experts."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch
from tiny_models import VOCABULARY_SIZE


@contextmanager
def forced_routing(model, choices, position, weights=None):
    """Let every router choose by a table.

    Args:
        model: a LabModel whose routers return logits, weights and indices.
        choices: int64 [L, T, K] on the device, what each position of the text chooses.
        position: int64 [1] on the device, of the first token of the pass that runs; it is read by
            the pass itself, so that a captured one follows it too.
        weights: float32 [L, T, K] on the device, of what is chosen; None to let routers weigh it.
    """

    def choose(layer):
        def hook(_, __, output):
            logits = output[0]
            places = position + torch.arange(len(logits), device=logits.device)
            chosen = choices[layer].index_select(0, places)
            if weights is None:
                shares = logits.float().softmax(dim=-1).gather(1, chosen)
                shares = shares / shares.sum(dim=-1, keepdim=True)
            else:
                shares = weights[layer].index_select(0, places)
            return logits, shares.to(output[1].dtype), chosen

        return hook

    with ExitStack() as hooks:
        for layer, found in enumerate(model.layers):
            handle = found.router.module.register_forward_hook(choose(layer))
            hooks.callback(handle.remove)
        yield


@contextmanager
def forced_experts(modules, choices, position):
    """Let a table choose experts, the first with the greatest weight, whatever routers return.

    Args:
        modules: the experts modules of every layer, of any model on transformers' interface.
        choices: see `forced_routing`, as is `position`.
        position: see there.
    """

    def choose(layer):
        def hook(_, arguments):
            hidden, _, weights = arguments
            places = position + torch.arange(len(hidden), device=hidden.device)
            chosen = choices[layer].index_select(0, places)
            falling = torch.arange(chosen.shape[1], 0, -1, device=hidden.device)
            falling = (falling / falling.sum()).expand(chosen.shape)
            return hidden, chosen, falling.to(weights.dtype)

        return hook

    with ExitStack() as hooks:
        for layer, experts in enumerate(modules):
            hooks.callback(experts.register_forward_pre_hook(choose(layer)).remove)
        yield


def random_choices(n_layers, n_tokens, n_experts, top_k, device, seed=0):
    """Return distinct experts for every layer and token, int64 [L, T, K]."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand((n_layers, n_tokens, n_experts), generator=generator)
    return scores.topk(top_k, dim=-1).indices.to(device)


def drawn_tokens(n_tokens):
    """Return token ids of a text for tiny models, int64 [T], always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, VOCABULARY_SIZE, (n_tokens,), generator=generator)


def step_through(decoder, ids, position, n_before):
    """Return the logits [N, V] of every step, all tokens but `n_before` given one by one."""
    found = []
    for number, token in enumerate(ids[n_before:].tolist(), start=n_before):
        position.fill_(number)
        found.append(decoder.step(token).float().clone())
    return torch.stack(found)
