"""What a config costs in loss, against the model as it is and against what the config promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.loss import evaluate_loss
from adapmoe_lab.records import TunedConfig
from adapmoe_lab.records.progress import Progress
from adapmoe_lab.records.standard_error import error_text
from adapmoe_lab.records.verify_report import Check

LOSS = "loss"

N_ERRORS = 2
AGREEING_SHARE = 0.2
"""A loss agrees with a promise within two standard errors of both, or within a fifth."""


def check_loss(
    model: LabModel, config: TunedConfig, texts: Sequence[str], progress: Progress | None = None
) -> Check:
    """Compare the loss under a config with the loss of the model as it is, paired by text.

    Where nothing is skipped the two are the same run. Where something is, the increase is held
    against the one that the config's evidence names, measured or else predicted.
    """
    found = evaluate_loss(model, config, texts, progress=progress)
    plain, promise = found, None
    if config.gating is not None:
        plain = evaluate_loss(model, TunedConfig.untuned(model.spec), texts, progress=progress)
        promise = promised_increase(config.evidence)
    increase, error = found.increase_over(plain)
    values = {
        "nats_per_token": found.nats_per_token,
        "plain_nats_per_token": plain.nats_per_token,
        "increase_nats": increase,
        "increase_se": error,
        "promised": promise,
        "found": found.to_json(),
        "plain": plain.to_json(),
    }
    in_words = (
        f"{found.nats_per_token:.4f} nats per token, {increase:+.4f} {error_text(error, '.4f')} "
        f"for {found.skipped_fraction:.1%} of experts skipped"
    )
    if config.gating is None:
        return Check(LOSS, "passed", in_words, "+0.0000", values)
    if promise is None:
        return Check(LOSS, "measured", in_words, values=values)
    bound = f"promised {promise['increase_nats']:+.4f} {error_text(promise['increase_se'], '.4f')}"
    excess = increase - promise["increase_nats"]
    if excess <= AGREEING_SHARE * abs(promise["increase_nats"]):
        return Check(LOSS, "passed", in_words, bound, values)
    if error is None or promise["increase_se"] is None:
        return Check(LOSS, "not known", in_words, bound, values)
    both = (error**2 + promise["increase_se"] ** 2) ** 0.5
    return Check(LOSS, "passed" if excess <= N_ERRORS * both else "failed", in_words, bound, values)


def promised_increase(evidence: Mapping[str, Any]) -> dict[str, float | None] | None:
    """Return the loss increase that a config's evidence names and its error; None if it has none.

    What was measured goes before what was predicted.
    """
    for name in ("measured", "predicted"):
        promised = evidence.get(name)
        if isinstance(promised, Mapping) and promised.get("loss_increase_nats") is not None:
            return {
                "increase_nats": promised["loss_increase_nats"],
                "increase_se": promised.get("loss_increase_se"),
            }
    return None
