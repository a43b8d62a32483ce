"""Continue a prompt."""

from __future__ import annotations

import argparse
from typing import Any

from adapmoe_lab.cli.shared import add_executor, add_model, load_model
from adapmoe_lab.cli.values import count, number, standard_input


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    generate = commands.add_parser("generate", help="continue a prompt")
    add_model(generate, config=True)
    add_executor(generate)
    generate.add_argument("prompt", help="text to continue; - reads it from standard input")
    generate.add_argument(
        "--chat", action="store_true", help="reply to the prompt as to a user's message"
    )
    generate.add_argument("--max-new-tokens", type=count(0), default=64, metavar="N")
    generate.add_argument("--temperature", type=number, default=0.0, metavar="T")
    generate.add_argument("--top-k", type=count(1), metavar="K", help="sample among K tokens")
    generate.add_argument(
        "--top-p", type=number, metavar="P", help="sample among tokens of probability P together"
    )
    generate.add_argument("--repetition-penalty", type=number, default=1.0, metavar="R")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N")
    generate.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    text = standard_input() if options.prompt == "-" else options.prompt
    parts = load_model(options).stream(
        [{"role": "user", "content": text}] if options.chat else text,
        options.max_new_tokens,
        options.temperature,
        options.seed,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        stop=options.stop,
    )
    if not options.chat:
        print(text, end="", flush=True)
    for part in parts:
        print(part, end="", flush=True)
    print()
