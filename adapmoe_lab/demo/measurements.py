"""What a finished checkpoint is worth: held-out loss, routing, grammar and samples of its text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from adapmoe_lab.demo.corpus import Domain
from adapmoe_lab.demo.losses import EVALUATION_BATCH_TOKENS, compute_weights, next_token_loss
from adapmoe_lab.demo.pairs import read_pairs, score_pairs
from adapmoe_lab.demo.publish import write_lines
from adapmoe_lab.demo.record import describe_machine
from adapmoe_lab.demo.routing_statistics import RoutingStatistics
from adapmoe_lab.demo.sampling import SamplingPlan, sample_texts
from adapmoe_lab.demo.tokens import encode_stream, windows
from adapmoe_lab.models.demo_architecture import DemoModel, load_checkpoint, routing_taps

MEASUREMENTS_NAME = "measurements.json"
WINDOW_TOKENS = 512
BLIMP_FILE = "blimp/blimp.jsonl.gz"
SAMPLE_PROMPTS = {
    "English story": "Once upon a time, there was a little girl who",
    "Python": "def read_lines(path):\n",
    "German": "Am nächsten Morgen ging der alte Mann",
}


@dataclass(frozen=True)
class DomainLoss:
    """Held-out loss of one domain; the standard error is over windows of 512 tokens."""

    nats_per_token: float
    standard_error: float
    nats_per_byte: float
    n_tokens: int


def measure_checkpoint(
    folder: Path,
    domains: Sequence[Domain],
    *,
    device: str,
    text: Path | None = None,
    pairs: Path | None = None,
    max_tokens: int | None = None,
) -> dict[str, object]:
    """Load a saved checkpoint with plain transformers and measure it on the held-out split.

    On a CPU the bfloat16 weights are computed with in float32. `pairs` is a file of minimal pairs;
    BLiMP is scored too where the `text` folder has it. `max_tokens` limits the tokens per domain.
    """
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    model, wrapped = load_checkpoint(folder, device=device, dtype=dtype)
    tokenizer: Tokenizer = wrapped.backend_tokenizer
    losses, routing = measure_held_out(model, tokenizer, domains, max_tokens)
    measured: dict[str, object] = {
        "conditions": describe_machine(device),
        "mean_nats_per_token": float(np.mean([loss.nats_per_token for loss in losses.values()])),
        "held_out": {name: asdict(loss) for name, loss in losses.items()},
        "routing": routing.as_dict(),
        "samples": {
            name: prompt + sample_texts(model, wrapped, [prompt], SamplingPlan(seed=0))[0]
            for name, prompt in SAMPLE_PROMPTS.items()
        },
    }
    if pairs is not None:
        measured["minimal_pairs"] = asdict(score_pairs(model, tokenizer, read_pairs(pairs)))
    if text is not None and (text / BLIMP_FILE).is_file():
        blimp = score_pairs(model, tokenizer, read_pairs(text / BLIMP_FILE))
        measured["blimp"] = asdict(blimp)
    return measured


def measure_held_out(
    model: DemoModel, tokenizer: Tokenizer, domains: Sequence[Domain], max_tokens: int | None = None
) -> tuple[dict[str, DomainLoss], RoutingStatistics]:
    """Return the loss of every domain that has held-out text, and routing averaged over them."""
    losses: dict[str, DomainLoss] = {}
    routing: list[RoutingStatistics] = []
    for domain in domains:
        stream = encode_stream(tokenizer, domain.held_out)
        rows = windows(stream, WINDOW_TOKENS, max_tokens)
        if not rows.size:
            continue
        by_window, statistics = _run(model, rows)
        n_bytes = sum(len(document.encode()) for document in domain.held_out)
        mean = float(by_window.mean())
        losses[domain.name] = DomainLoss(
            nats_per_token=mean,
            standard_error=float(by_window.std(ddof=1) / len(rows) ** 0.5)
            if len(rows) > 1
            else 0.0,
            nats_per_byte=mean * len(stream) / n_bytes,
            n_tokens=by_window.size * (rows.shape[1] - 1),
        )
        routing.append(statistics)
    if not losses:
        raise ValueError(
            "no domain has held-out text to measure; add valid.* files or more documents."
        )
    return losses, RoutingStatistics.mean_of(routing)


def write_measurements(folder: Path, measured: dict[str, object]) -> None:
    """Write `measurements.json`."""
    text = json.dumps(measured, indent=2, ensure_ascii=False)
    write_lines(folder / MEASUREMENTS_NAME, [text])


@torch.no_grad()
def _run(model: DemoModel, rows: np.ndarray) -> tuple[np.ndarray, RoutingStatistics]:
    """Return each window's mean loss, float64[N], and the routing of all of them."""
    weights = compute_weights(model)
    n_rows = max(1, EVALUATION_BATCH_TOKENS.get(model.device.type, 4_096) // rows.shape[1])
    losses, routing = [], []
    with routing_taps(model) as taps:
        for batch in torch.from_numpy(rows).split(n_rows):
            by_token = next_token_loss(model, weights, batch.to(model.device))
            losses.append(by_token.double().mean(1).cpu().numpy())
            routing.append(RoutingStatistics.of_pass(model, taps, len(batch)))
    return np.concatenate(losses), RoutingStatistics.mean_of(routing)
