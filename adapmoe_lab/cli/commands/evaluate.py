"""Loss on texts, and lm-eval tasks."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from typing import Any

from adapmoe_lab.cli.shared import add_model, add_texts, given_texts, load_model, progress
from adapmoe_lab.cli.values import count


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    evaluate = commands.add_parser("evaluate", help="loss on texts, and lm-eval tasks")
    add_model(evaluate, config=True)
    add_texts(evaluate)
    evaluate.add_argument("--tasks", nargs="+", metavar="TASK", help="minimal_pairs, blimp, ...")
    evaluate.add_argument("--limit", type=count(1), metavar="N", help="examples per task")
    evaluate.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from adapmoe_lab.evaluation.harness import evaluate, open_tasks
    from adapmoe_lab.evaluation.loss import evaluate_loss

    texts = given_texts(options) if options.texts is not None or not options.tasks else None
    with ExitStack() as stack:
        tasks = stack.enter_context(open_tasks(options.tasks)) if options.tasks else None
        model = load_model(options)
        if texts is not None:
            print(_loss_line(model, evaluate_loss(model, None, texts, progress=progress)))
        if tasks is not None:
            print(json.dumps(evaluate(model, None, tasks, limit=options.limit), indent=2))


def _loss_line(model: Any, report: Any) -> str:
    skipped = report.skipped_fraction
    return (
        f"loss {report.nats_per_token:.4f} nats/token "
        f"over {report.n_predicted.sum():,} tokens; "
        f"{model.spec.experts_run(skipped):.3f} experts/token, {skipped:.1%} skipped"
    )
