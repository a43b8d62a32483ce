"""What several engine tests run: a prompt, half the experts cached, the right text."""

from __future__ import annotations

from dataclasses import replace

from adapmoe_lab.engine.generation.tokens import generate_tokens
from adapmoe_lab.engine.host_driven.decoder import TransformersDecoder
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.records import TunedConfig

PROMPT = "Once upon a time there was a king who"


def decode(hf, prompt, max_new_tokens, **options):
    """Return the tokens that a transformers model adds to a prompt, whoever runs its experts."""
    return list(generate_tokens(TransformersDecoder(hf), prompt, max_new_tokens, **options))


def half_cached(model):
    """Give every layer room for half of its experts, and return the model."""
    plan = slots_plan(model.spec, model.spec.n_experts // 2)
    model.apply(replace(TunedConfig.untuned(model.spec), plan=plan))
    return model


def reference_text(load_tiny):
    """Return the tokens that an undisturbed model with every expert cached continues with."""
    model = load_tiny()
    return decode(model.hf, model.encode(PROMPT), 24)
