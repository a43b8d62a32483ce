"""Next-token loss of a model under a configuration, on any text."""

from __future__ import annotations

import torch

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.texts import Texts, as_texts, calibration_texts
from adapmoe_lab.records import LossReport, TunedConfig
from adapmoe_lab.records.arguments import whole_number
from adapmoe_lab.records.files import digest
from adapmoe_lab.records.progress import Progress

MAX_TOKENS = 512


def evaluate_loss(
    model: LabModel,
    config: TunedConfig | None = None,
    texts: Texts | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> LossReport:
    """Measure the summed next-token loss of each text, in nats.

    Gating applies as it does in any other run. Experts are read from the store, since where they
    lie changes the time and not the loss.

    Args:
        model: the model to run.
        config: the configuration to run under; the present one if None.
        texts: one sequence each; the shipped calibration texts if None.
        max_tokens: longer texts are cut to this many tokens.
        progress: called with (done, total, text); what it raises stops the run.

    Raises:
        ValueError: there is no text, one too short to predict anything, or something else.
    """
    sequences = token_sequences(model, texts, max_tokens)
    nats = []
    with torch.no_grad(), model.running(config), model.engine.reading_store():
        for done, ids in enumerate(sequences):
            if progress is not None:
                progress(done, len(sequences), "measuring loss")
            logits = model.hf(input_ids=ids[None].to(model.engine.device), use_cache=False).logits[
                0
            ]
            targets = ids[1:].to(logits.device)
            summed = torch.nn.functional.cross_entropy(
                logits[:-1].float(), targets, reduction="sum"
            )
            nats.append(float(summed))
        traffic = model.engine.traffic
    if progress is not None:
        progress(len(sequences), len(sequences), "measuring loss")
    return LossReport(
        nats=nats,
        n_predicted=[len(ids) - 1 for ids in sequences],
        skipped_fraction=traffic.skipped_fraction,
        texts=digest(*(ids.numpy().tobytes() for ids in sequences)),
    )


def token_sequences(
    model: LabModel, texts: Texts | None, max_tokens: int = MAX_TOKENS
) -> list[torch.Tensor]:
    """Return texts as token ids int64 [T], cut to `max_tokens`; calibration texts if None.

    Raises:
        ValueError: there is no text, one too short to predict anything, or something else.
    """
    max_tokens = whole_number("max_tokens", max_tokens, at_least=2)
    texts = calibration_texts() if texts is None else as_texts(texts)
    sequences = [model.encode(text)[:max_tokens] for text in texts]
    short = [i for i, ids in enumerate(sequences) if len(ids) < 2]
    if short or not sequences:
        raise ValueError(
            "Loss needs texts of at least two tokens each; "
            + (f"text {short[0]} is shorter." if short else "there is none.")
        )
    return sequences
