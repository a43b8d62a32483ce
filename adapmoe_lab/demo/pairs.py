"""Minimal pairs: how often the grammatical sentence is the likelier one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from adapmoe_lab.demo.losses import compute_weights, next_token_loss
from adapmoe_lab.evaluation.texts import read_records
from adapmoe_lab.models.demo_architecture import END_OF_TEXT, DemoModel
from adapmoe_lab.records.arguments import one_string

BATCH_SENTENCES = 256


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences that differ in one respect; only the first is grammatical."""

    paradigm: str
    good: str
    bad: str


@dataclass(frozen=True)
class PairsScore:
    """Share of pairs in which the good sentence has the higher probability."""

    accuracy: float
    n_pairs: int
    by_paradigm: dict[str, float]


def read_pairs(path: Path) -> list[MinimalPair]:
    """Read .jsonl or .jsonl.gz records {paradigm or UID, good, bad}.

    Raises:
        ValueError: a line is no such record; the error says which.
    """
    return [_pair(record, f"{path}, line {line}") for line, record in read_records(path)]


def _pair(record: Mapping[str, Any], place: str) -> MinimalPair:
    fields = ("paradigm" if record.get("paradigm") else "UID", "good", "bad")
    missing = [field for field in fields if field not in record]
    if missing:
        raise ValueError(f"{place}: lacks {', '.join(missing)}.")
    return MinimalPair(*(one_string(f"{place}: its {field}", record[field]) for field in fields))


def score_pairs(model: DemoModel, tokenizer: Tokenizer, pairs: Sequence[MinimalPair]) -> PairsScore:
    """Compare the summed log-probabilities of whole sentences, each after the end-of-text token.

    Equal probabilities count as a failure.
    """
    good = sentence_losses(model, tokenizer, [pair.good for pair in pairs])
    bad = sentence_losses(model, tokenizer, [pair.bad for pair in pairs])
    correct: dict[str, list[bool]] = defaultdict(list)
    for pair, won in zip(pairs, (good < bad).tolist(), strict=True):
        correct[pair.paradigm].append(won)
    return PairsScore(
        accuracy=sum(map(sum, correct.values())) / len(pairs),
        n_pairs=len(pairs),
        by_paradigm={name: sum(won) / len(won) for name, won in sorted(correct.items())},
    )


@torch.no_grad()
def sentence_losses(
    model: DemoModel, tokenizer: Tokenizer, sentences: Sequence[str]
) -> torch.Tensor:
    """Return float32[N] on the CPU: each sentence's summed next-token loss in nats."""
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    rows = [[end_of_text, *e.ids] for e in tokenizer.encode_batch_fast(list(sentences))]
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    weights = compute_weights(model)
    losses = torch.zeros(len(rows))
    for start in range(0, len(rows), BATCH_SENTENCES):
        chosen = by_length[start : start + BATCH_SENTENCES]
        lengths = torch.tensor([len(rows[index]) for index in chosen])
        width = int(lengths.max())
        batch = torch.tensor([rows[i] + [end_of_text] * (width - len(rows[i])) for i in chosen])
        by_token = next_token_loss(model, weights, batch.to(model.device)).cpu()  # [B, S]
        # Padding stands on the right, where a causal model cannot see it; its own loss is dropped.
        real = torch.arange(1, width) < lengths[:, None]
        losses[chosen] = (by_token * real).sum(1)
    return losses
