"""Random surrogates, and what a layer with compensated experts must give, token by token."""

from __future__ import annotations

from types import MethodType

import numpy as np
import torch
from torch import nn

from adapmoe_lab.records import GatingTable, MoESpec, Surrogates


def random_surrogates(spec: MoESpec, ranks=None, gain=None, seed=0) -> Surrogates:
    """Return surrogates of no meaning, by default of another rank in every layer."""
    rng = np.random.default_rng(seed)
    n_experts, width = spec.n_experts, spec.hidden_size
    ranks = range(spec.n_layers) if ranks is None else ranks
    return Surrogates(
        model_fingerprint=spec.fingerprint(),
        down=[rng.normal(size=(n_experts, rank, width)) for rank in ranks],
        up=[0.1 * rng.normal(size=(n_experts, width, rank)) for rank in ranks],
        offset=[rng.normal(size=(n_experts, width)) for _ in ranks],
        gain=rng.uniform(-0.5, 1.5, spec.n_layers) if gain is None else gain,
        method="random",
    )


def random_cuts(spec: MoESpec, seed=0) -> GatingTable:
    """Return cuts that differ by layer and number kept, low enough for every number to occur."""
    rng = np.random.default_rng(seed)
    fair = np.arange(1, spec.top_k) / spec.top_k
    return GatingTable(fair + rng.uniform(0.0, 0.9, (spec.n_layers, 1)) * (1 - fair))


def compensated_output(experts, original, routed, cuts, surrogates, layer) -> torch.Tensor:
    """Return a layer's output [T, D] by the written-out formula, one token and expert at a time.

    `original` is the unmodified experts' forward, `routed` its three arguments.
    """
    hidden, top_k_index, top_k_weights = routed
    output = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        x = hidden[token].numpy()
        chosen = [
            (float(weight), int(expert))
            for weight, expert in zip(top_k_weights[token], top_k_index[token], strict=True)
            if expert < surrogates.n_experts
        ]
        chosen.sort(key=lambda pair: -pair[0])
        total = sum(weight for weight, _ in chosen)
        reached, n_kept = 0.0, 0
        for n_kept, (weight, _) in enumerate(chosen, start=1):
            reached += weight / total
            if n_kept < len(chosen) and reached >= cuts[n_kept - 1]:
                break
        kept, dropped = chosen[:n_kept], chosen[n_kept:]
        ratio = sum(w for w, _ in dropped) / sum(w for w, _ in kept)
        for weight, expert in kept:
            one = torch.tensor([[expert]]), torch.ones(1, 1)
            produced = original(experts, hidden[token : token + 1], *one)[0]
            output[token] += (1 + surrogates.gain[layer] * ratio) * weight * produced
        for weight, expert in dropped:
            down, up = surrogates.down[layer][expert], surrogates.up[layer][expert]
            stand_in = surrogates.offset[layer][expert] + up @ (down @ x)
            output[token] += weight * torch.from_numpy(stand_in)
    return output


def compensate(hf: nn.Module, paths, cuts, surrogates: Surrogates) -> None:
    """Make an unmodified model's experts give the written-out formula."""
    hf.set_experts_implementation("eager")
    for layer, path in enumerate(paths):
        experts = hf.get_submodule(path)

        def forward(self, *routed, layer=layer):
            original = type(self).forward
            return compensated_output(self, original, routed, cuts[layer], surrogates, layer)

        experts.forward = MethodType(forward, experts)
