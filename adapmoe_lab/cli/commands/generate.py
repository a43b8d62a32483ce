"""Continue a prompt."""

from __future__ import annotations

import argparse
from typing import Any

from adapmoe_lab.cli.shared import add_model, load_model
from adapmoe_lab.cli.values import count, number, standard_input


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    generate = commands.add_parser("generate", help="continue a prompt")
    add_model(generate, config=True)
    generate.add_argument("prompt", help="text to continue; - reads it from standard input")
    generate.add_argument("--max-new-tokens", type=count(0), default=64, metavar="N")
    generate.add_argument("--temperature", type=number, default=0.0, metavar="T")
    generate.add_argument("--seed", type=int, default=0, metavar="N")
    generate.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    prompt = standard_input() if options.prompt == "-" else options.prompt
    model = load_model(options)
    parts = model.stream(prompt, options.max_new_tokens, options.temperature, options.seed)
    print(prompt, end="", flush=True)
    for part in parts:
        print(part, end="", flush=True)
    print()
