"""The `adapmoe-lab` command. It parses, calls, and prints; what it calls is imported on use."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from adapmoe_lab.cli.values import check_output, count, number, standard_input

PROGRAM = "adapmoe-lab"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 if it failed, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError, MemoryError) as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM} {options.command}: stopped.", file=sys.stderr)
        return 130


def _lab(options: argparse.Namespace) -> int:
    from adapmoe_lab.workbench.jupyter import TOUR, copy_notebooks, open_lab

    for notebook in copy_notebooks(options.folder):
        print(f"Copied {notebook}.")
    print(f"Opening JupyterLab at {options.folder / TOUR}. Stop it with Ctrl-C.", flush=True)
    return open_lab(options.folder, options.port, not options.no_browser)


def _generate(options: argparse.Namespace) -> None:
    prompt = standard_input() if options.prompt == "-" else options.prompt
    model = _load(options)
    print(model.generate(prompt, options.max_new_tokens, options.temperature, options.seed))


def _profile(options: argparse.Namespace) -> None:
    from adapmoe_lab.profiling.routing.profile import profile

    texts = _texts(options)
    check_output(options.out)
    trace = profile(_load(options), texts, reuse=not options.again, progress=_progress)
    if options.out is not None:
        print(f"Wrote {trace.save(options.out)}.")


def _tune(options: argparse.Namespace) -> None:
    from adapmoe_lab.policies.allocation.slots import budget_bytes, uniform_plan
    from adapmoe_lab.policies.gating.registry import check_method
    from adapmoe_lab.policies.gating.rule import check_skipped_fraction
    from adapmoe_lab.profiling.hardware.probe import probe_hardware
    from adapmoe_lab.profiling.predictors.fit import fit_predictors
    from adapmoe_lab.profiling.project import check_project
    from adapmoe_lab.profiling.routing.profile import profile
    from adapmoe_lab.profiling.sensitivity.sensitivity import sensitivity
    from adapmoe_lab.profiling.surrogates.fit import fit_surrogates
    from adapmoe_lab.tuning.tune import check_skippable, tune

    # What can be refused is refused before long work.
    texts = _texts(options)
    check_method(options.method)
    check_output(options.out)
    check_project()
    model = _load(options)
    check_skippable(model.spec)
    if options.skipped_fraction is not None:
        check_skipped_fraction(options.skipped_fraction, model.spec.top_k)
    uniform_plan(model.spec, budget_bytes(options.budget, model.spec))
    half = len(texts) // 2 or 1
    calibration, surrogates = texts[:half], None
    if options.surrogate_memory is not None:
        surrogates = fit_surrogates(
            model, calibration, budget_bytes=options.surrogate_memory, progress=_progress
        )
    predictors = fit_predictors(model, calibration) if options.fit_predictors else None
    config = tune(
        profile(model, calibration, predictors=predictors, progress=_progress),
        sensitivity(model, calibration, compensation=surrogates, progress=_progress),
        probe_hardware(model),
        compensation=surrogates,
        prefetch=not options.no_prefetch,
        predictors=predictors,
        expert_memory=options.budget,
        skipped_fraction=options.skipped_fraction,
        max_loss_increase_nats=options.max_loss_increase_nats,
        method=options.method,
        model=model if options.verify else None,
        texts=(texts[half:] or texts) if options.verify else None,
    )
    print(json.dumps(dict(config.evidence), indent=2))
    print(f"Wrote {config.save(options.out)}.")


def _evaluate(options: argparse.Namespace) -> None:
    from adapmoe_lab.evaluation.harness import evaluate, open_tasks
    from adapmoe_lab.evaluation.loss import evaluate_loss

    texts = _texts(options) if options.texts is not None or not options.tasks else None
    with ExitStack() as stack:
        tasks = stack.enter_context(open_tasks(options.tasks)) if options.tasks else None
        model = _load(options)
        if texts is not None:
            print(_loss_line(model, evaluate_loss(model, None, texts, progress=_progress)))
        if tasks is not None:
            print(json.dumps(evaluate(model, None, tasks, limit=options.limit), indent=2))


def _loss_line(model: Any, report: Any) -> str:
    skipped = report.skipped_fraction
    return (
        f"loss {report.nats_per_token:.4f} nats/token "
        f"over {report.n_predicted.sum():,} tokens; "
        f"{(1 - skipped) * model.spec.top_k:.3f} experts/token, {skipped:.1%} skipped"
    )


def _bench(options: argparse.Namespace) -> None:
    from adapmoe_lab.tuning.compare import run_bench

    texts = None if options.texts is None else _texts(options)
    check_output(options.out)
    report = run_bench(
        _load(options),
        targets=options.targets,
        skipped_fractions=options.skipped_fraction,
        slots_per_layer=options.slots_per_layer,
        method=options.method,
        texts=texts,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
    )
    print(report.table())
    if options.out is not None:
        print(f"Wrote {report.save(options.out)}.")


def _doctor(options: argparse.Namespace) -> None:
    from adapmoe_lab.cli.doctor import examine, model_report, report

    if options.model is None:
        print(report(examine()))
        return
    from adapmoe_lab.models.checkpoint.checkpoint import look_at_model

    model = look_at_model(options.model, options.dtype, options.revision)
    print(model_report(model, examine(), options.max_context_tokens))


def _load(options: argparse.Namespace) -> Any:
    from adapmoe_lab.engine.loading import load

    return load(
        options.model,
        config=getattr(options, "config", None),
        device=options.device,
        dtype=options.dtype,
        expert_dtype=options.expert_dtype,
        expert_memory=getattr(options, "expert_memory", None),
        host_memory=options.host_memory,
        store=options.store,
        revision=options.revision,
        link=options.link,
        announce=_to_stderr,
    )


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def _texts(options: argparse.Namespace) -> list[str]:
    from adapmoe_lab.evaluation.texts import calibration_texts, read_texts

    return calibration_texts() if options.texts is None else read_texts(options.texts)


def _progress(done: int, total: int, text: str) -> None:
    if sys.stderr.isatty():
        end = "\n" if done >= total else ""
        print(f"\r{text}: {done}/{total}", end=end, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="See, tune and run Mixture-of-Experts models whose experts do not fit the GPU.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_lab(commands)
    _add_generate(commands)
    _add_profile(commands)
    _add_tune(commands)
    _add_evaluate(commands)
    _add_bench(commands)
    _add_doctor(commands)
    return parser


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="versions, GPU, memory, link speed, what would fit")
    doctor.add_argument(
        "model", nargs="?", help="demo, a folder or a hub id: what it takes, by its config alone"
    )
    doctor.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    doctor.add_argument("--revision", help="branch, tag or commit of a hub id")
    doctor.add_argument("--max-context-tokens", type=int, metavar="N", help="default: 4096")
    doctor.set_defaults(run=_doctor)


def _add_lab(commands: Any) -> None:
    lab = commands.add_parser("lab", help="open JupyterLab at the tour")
    lab.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("adapmoe-lab-notebooks"),
        help="where the notebooks are; missing ones are copied there (default: %(default)s)",
    )
    lab.add_argument("--port", type=int, help="port on 127.0.0.1 (default: the first free one)")
    lab.add_argument("--no-browser", action="store_true", help="print the address, open nothing")
    lab.set_defaults(run=_lab)


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="continue a prompt")
    _add_model(generate, config=True)
    generate.add_argument("prompt", help="text to continue; - reads it from standard input")
    generate.add_argument("--max-new-tokens", type=count(0), default=64, metavar="N")
    generate.add_argument("--temperature", type=number, default=0.0, metavar="T")
    generate.add_argument("--seed", type=int, default=0, metavar="N")
    generate.set_defaults(run=_generate)


def _add_profile(commands: Any) -> None:
    profile = commands.add_parser("profile", help="record which experts texts use")
    _add_model(profile, config=True)
    _add_texts(profile)
    profile.add_argument("--out", type=Path, metavar="FILE", help="also write the trace here")
    profile.add_argument("--again", action="store_true", help="record even if a trace was kept")
    profile.set_defaults(run=_profile)


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser("tune", help="choose cuts and slots, and write a config")
    _add_model(tune, config=False)
    _add_texts(tune)
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
        "--fit-predictors", action="store_true", help="fit what may tell which experts come next"
    )
    tune.add_argument("--no-prefetch", action="store_true", help="fetch nothing ahead")
    tune.add_argument("--verify", action="store_true", help="measure the loss and keep the promise")
    tune.set_defaults(run=_tune)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="loss on texts, and lm-eval tasks")
    _add_model(evaluate, config=True)
    _add_texts(evaluate)
    evaluate.add_argument("--tasks", nargs="+", metavar="TASK", help="minimal_pairs, blimp, ...")
    evaluate.add_argument("--limit", type=count(1), metavar="N", help="examples per task")
    evaluate.set_defaults(run=_evaluate)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="decode ratios and loss, with and without skipping")
    _add_model(bench, config=False)
    _add_texts(bench)
    bench.add_argument(
        "--targets",
        nargs="+",
        metavar="LINK",
        help="links to emulate, none for no link (default: all)",
    )
    bench.add_argument("--skipped-fraction", type=number, nargs="+", default=[0.125, 0.25])
    bench.add_argument(
        "--slots-per-layer", type=count(0), metavar="N", help="default: half the experts"
    )
    bench.add_argument("--method", default="uniform", help="uniform, adapmoe or curve")
    bench.add_argument("--new-tokens", type=count(2), default=48, metavar="N")
    bench.add_argument("--rounds", type=count(1), default=5, metavar="N")
    bench.add_argument("--out", type=Path, metavar="FILE", help="write all samples as JSON")
    bench.set_defaults(run=_bench)


def _add_model(parser: argparse.ArgumentParser, *, config: bool) -> None:
    parser.add_argument("model", help="demo, a folder that save_pretrained wrote, or a hub id")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: CUDA where there is one)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--expert-dtype", default="auto", metavar="P", help="auto, bf16, int8, int4, int3 or int2"
    )
    parser.add_argument(
        "--host-memory", metavar="SIZE", help="host memory for experts (default: what is free)"
    )
    parser.add_argument(
        "--store", type=Path, metavar="DIR", help="prepared experts: opened, or written first"
    )
    parser.add_argument("--link", help="link to emulate on a CPU, none for no emulation")
    if config:
        parser.add_argument("--config", type=Path, metavar="FILE", help="tuned config to run under")
        parser.add_argument(
            "--expert-memory", metavar="SIZE", help="40%%, 8GiB (default: what is left)"
        )


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help=".jsonl or text file, gzip allowed (default: the shipped calibration texts)",
    )
