"""Choose cuts, slots and prefetch, and write a config."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapmoe_lab.cli.shared import add_model, add_texts, given_texts, load_model, progress
from adapmoe_lab.cli.values import check_output, number


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    tune = commands.add_parser("tune", help="choose cuts and slots, and write a config")
    add_model(tune, config=False)
    add_texts(tune)
    tune.add_argument("--out", type=Path, default=Path("tuned.json"), metavar="FILE")
    tune.add_argument(
        "--budget", default="50%", metavar="SIZE", help="memory for experts: 40%%, 8GiB"
    )
    tune.add_argument(
        "--skipped-fraction", type=number, metavar="F", help="experts to skip, 0 to 1"
    )
    tune.add_argument("--max-loss-increase-nats", type=number, default=0.01, metavar="NATS")
    tune.add_argument("--method", default="uniform", help="uniform, adapmoe or curve")
    tune.add_argument(
        "--surrogate-memory", metavar="SIZE", help="device memory for surrogates, such as 2%%"
    )
    tune.add_argument(
        "--fit-predictors", action="store_true", help="fit predictors of the experts needed next"
    )
    tune.add_argument("--no-prefetch", action="store_true", help="load experts on demand only")
    tune.add_argument("--verify", action="store_true", help="measure the loss and keep the promise")
    tune.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from adapmoe_lab.evaluation.texts import calibration_split
    from adapmoe_lab.policies.allocation.slots import budget_bytes, uniform_plan
    from adapmoe_lab.policies.gating.registry import check_method
    from adapmoe_lab.policies.gating.rule import check_skipped_fraction
    from adapmoe_lab.profiling.hardware.probe import probe_hardware
    from adapmoe_lab.profiling.project import check_project
    from adapmoe_lab.profiling.routing.profile import profile
    from adapmoe_lab.profiling.sensitivity.sensitivity import sensitivity
    from adapmoe_lab.tuning.tune import check_skippable, tune

    # What can be refused is refused before long work.
    texts = given_texts(options)
    check_method(options.method)
    check_output(options.out)
    check_project()
    model = load_model(options)
    check_skippable(model.spec)
    if options.skipped_fraction is not None:
        check_skipped_fraction(options.skipped_fraction, model.spec.top_k)
    uniform_plan(model.spec, budget_bytes(options.budget, model.spec))
    calibration, unseen = calibration_split(texts)
    surrogates, predictors = _fitted(model, calibration, options)
    config = tune(
        profile(model, calibration, predictors=predictors, progress=progress),
        sensitivity(model, calibration, compensation=surrogates, progress=progress),
        probe_hardware(model),
        compensation=surrogates,
        prefetch=not options.no_prefetch,
        predictors=predictors,
        expert_memory=options.budget,
        skipped_fraction=options.skipped_fraction,
        max_loss_increase_nats=options.max_loss_increase_nats,
        method=options.method,
        model=model if options.verify else None,
        texts=unseen if options.verify else None,
    )
    print(json.dumps(dict(config.evidence), indent=2))
    print(f"Wrote {config.save(options.out)}.")


def _fitted(model: Any, texts: Sequence[str], options: argparse.Namespace) -> tuple[Any, Any]:
    """Return surrogates and predictors, as far as they were asked for."""
    from adapmoe_lab.profiling.predictors.fit import fit_predictors
    from adapmoe_lab.profiling.surrogates.fit import fit_surrogates

    surrogates = None
    if options.surrogate_memory is not None:
        surrogates = fit_surrogates(
            model, texts, budget_bytes=options.surrogate_memory, progress=progress
        )
    predictors = fit_predictors(model, texts) if options.fit_predictors else None
    return surrogates, predictors
