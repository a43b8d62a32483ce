"""What several commands ask for: a model and texts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_model(parser: argparse.ArgumentParser, *, config: bool) -> None:
    """Ask for a model and how to load it; with `config`, for what to run it under too."""
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


def add_executor(parser: argparse.ArgumentParser) -> None:
    """Ask for what runs the experts."""
    parser.add_argument(
        "--executor", default="host", help="host, graph or auto (default: %(default)s)"
    )
    parser.add_argument(
        "--compile-steps", action="store_true", help="compile captured steps: faster, later"
    )


def add_texts(parser: argparse.ArgumentParser) -> None:
    """Ask for a file of texts."""
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help=".jsonl or text file, gzip allowed (default: the shipped calibration texts)",
    )


def load_model(options: argparse.Namespace) -> Any:
    """Load the model that `add_model` asked for, under its config if one was given."""
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
        executor=getattr(options, "executor", "host"),
        compile_steps=getattr(options, "compile_steps", False),
        announce=print_to_stderr,
    )


def given_texts(options: argparse.Namespace) -> list[str]:
    """Return the texts that `add_texts` asked for; the shipped ones if none were given."""
    from adapmoe_lab.evaluation.texts import calibration_texts, read_texts

    return calibration_texts() if options.texts is None else read_texts(options.texts)


def progress(done: int, total: int, text: str) -> None:
    """Show on a terminal how far long work is."""
    if sys.stderr.isatty():
        end = "\n" if done >= total else ""
        print(f"\r{text}: {done}/{total}", end=end, file=sys.stderr, flush=True)


def print_to_stderr(text: str) -> None:
    """Print a line beside the results."""
    print(text, file=sys.stderr)
