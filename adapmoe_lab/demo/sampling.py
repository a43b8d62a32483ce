"""Text from a demo model: nucleus sampling, repeatable by seed on one machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapmoe_lab.models.demo_architecture import DemoModel, DemoTokenizer


@dataclass(frozen=True)
class SamplingPlan:
    """How a text is drawn: temperature, then the smallest set of tokens of mass `top_p`."""

    seed: int
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 96


@torch.no_grad()
def sample_texts(
    model: DemoModel, tokenizer: DemoTokenizer, prompts: list[str], plan: SamplingPlan
) -> list[str]:
    """Return what the model adds to each prompt; an empty prompt starts a new text.

    The prompts are continued one after another, so that no padding is involved.
    """
    torch.manual_seed(plan.seed)
    continuations = []
    for prompt in prompts:
        ids = [tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]
        produced = model.generate(
            torch.tensor([ids], device=model.device),
            attention_mask=torch.ones((1, len(ids)), dtype=torch.long, device=model.device),
            do_sample=True,
            temperature=plan.temperature,
            top_p=plan.top_p,
            max_new_tokens=plan.max_new_tokens,
        )
        continuations.append(tokenizer.decode(produced[0, len(ids) :], skip_special_tokens=True))
    return continuations
