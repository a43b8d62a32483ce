"""Command that trains a demo model.

`python -m adapmoe_lab.demo.train --text FOLDER --out FOLDER`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from adapmoe_lab.demo.card import write_card
from adapmoe_lab.demo.corpus import DEMO_DOMAINS, Domain, read_corpus
from adapmoe_lab.demo.measurements import measure_checkpoint, write_measurements
from adapmoe_lab.demo.publish import staged_folder
from adapmoe_lab.demo.recipe import Recipe
from adapmoe_lab.demo.record import RunFacts, write_loss_curve, write_training_record
from adapmoe_lab.demo.tokens import encode_stream, train_tokenizer, windows
from adapmoe_lab.demo.trainer import CurvePoint, TrainingResult, train_model
from adapmoe_lab.models.demo_architecture import (
    END_OF_TEXT,
    FAMILIES,
    DemoArchitecture,
    build_model,
    n_parameters,
    save_checkpoint,
    wrap_tokenizer,
)

MAX_SHARD_SIZE = "15MB"  # a repository takes files of this size without complaint


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, save, measure and describe a demo model; return the exit status."""
    options = argument_parser().parse_args(arguments)
    recipe = recipe_from(options)
    domains = read_corpus(options.text, options.domains)
    with staged_folder(options.out) as folder:
        result = train_into(folder, domains, recipe, text=options.text, device=options.device)
        if not options.skip_measurements:
            measured = measure_checkpoint(
                folder, domains, device=options.device, text=options.text, pairs=options.pairs
            )
            write_measurements(folder, measured)
            write_card(folder)
    for name, loss in result.development_loss_by_domain.items():
        print(f"development loss  {name:24} {loss:.4f}")
    mean = np.mean(list(result.development_loss_by_domain.values()))
    print(f"development loss  {'mean':24} {mean:.4f}\nwritten to {options.out}")
    return 0


def train_into(
    folder: Path, domains: Sequence[Domain], recipe: Recipe, *, text: Path, device: str
) -> TrainingResult:
    """Train on the domains and write checkpoint, tokenizer, training record and loss curve."""
    torch.manual_seed(recipe.seed)
    architecture = recipe.architecture
    tokenizer = train_tokenizer(domains, architecture.vocabulary_size)
    training = {domain.name: encode_stream(tokenizer, domain.training) for domain in domains}
    development = {
        domain.name: windows(
            encode_stream(tokenizer, domain.development),
            recipe.sequence_length,
            recipe.development_tokens,
        )
        for domain in domains
    }
    model = build_model(architecture, tokenizer.token_to_id(END_OF_TEXT)).to(device)
    n_tokens = sum(map(len, training.values()))
    print(
        f"{n_parameters(model):,} parameters, {n_tokens:,} tokens of text, on {device}", flush=True
    )
    result = train_model(model, training, development, recipe, _print_point)
    save_checkpoint(model, folder, max_shard_size=MAX_SHARD_SIZE)
    wrap_tokenizer(tokenizer, architecture.max_positions).save_pretrained(folder)
    sizes = {name: len(stream) for name, stream in training.items()}
    write_training_record(
        folder, RunFacts(domains, sizes, recipe, result, n_parameters(model), text, device)
    )
    write_loss_curve(folder, result.curve)
    return result


def recipe_from(options: argparse.Namespace) -> Recipe:
    """Return the recipe that the options name; `--epochs` alone lifts the time limit."""
    chosen = {name: value for name, value in vars(options).items() if value is not None}
    if "epochs" in chosen and "minutes" not in chosen:
        chosen["minutes"] = None
    architecture = DemoArchitecture(
        **{f.name: chosen[f.name] for f in fields(DemoArchitecture) if f.name in chosen}
    )
    choices = {f.name: chosen[f.name] for f in fields(Recipe) if f.name in chosen}
    return Recipe(architecture=architecture, **choices)


def _print_point(point: CurvePoint) -> None:
    print(
        f"step {point.step:6}  {point.seconds:6.0f} s  {point.n_tokens / 1e6:7.2f}M tokens  "
        f"{point.n_tokens / point.seconds / 1e3:6.1f}k tokens/s  "
        f"training {point.training_loss:.4f}  development {point.development_loss:.4f}",
        flush=True,
    )


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command; `recipe_from` reads what it gives."""
    parser = argparse.ArgumentParser(prog="python -m adapmoe_lab.demo.train", description=__doc__)
    add = parser.add_argument
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--text", type=Path, required=True, help="folder of text: one sub-folder per domain")
    add("--out", type=Path, required=True, help="folder of the checkpoint; replaced at the end")
    add("--domains", nargs="+", metavar="NAME", help=f"default: {' '.join(DEMO_DOMAINS)}, or all")
    add("--device", default=default_device, help="torch device (default here: %(default)s)")
    add("--pairs", type=Path, help="minimal pairs to score, as written by adapmoe_lab.demo.grammar")
    add(
        "--skip-measurements",
        action="store_true",
        help="look at no held-out text; for recipe trials",
    )
    add("--family", choices=tuple(FAMILIES), help="of the model (default: mixtral)")
    for name, kind, meaning in _NUMBERS:
        add(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=meaning)
    return parser


_NUMBERS: tuple[tuple[str, type, str], ...] = (
    ("minutes", float, "end after this wall time (default: 8, or none with --epochs)"),
    ("epochs", float, "end after this many passes over the text"),
    ("learning_rate", float, "peak learning rate"),
    ("weight_decay", float, "AdamW's decay of matrices"),
    ("dropout", float, "on embeddings and block outputs"),
    ("balance_weight", float, "weight of the routers' load-balancing loss"),
    ("size_exponent", float, "share of a domain = size ** this; 1 reads all equally often"),
    ("sequence_length", int, "tokens predicted per window"),
    ("batch_sequences", int, "windows per step"),
    ("n_evaluations", int, "points of the loss curve"),
    ("seed", int, "of weights, batches and dropout"),
    ("n_layers", int, "layers of the model"),
    ("n_experts", int, "experts per layer"),
    ("top_k", int, "experts that a token uses"),
    ("hidden_size", int, "width of the model"),
    ("intermediate_size", int, "width of an expert"),
    ("vocabulary_size", int, "tokens of the byte-level BPE"),
)

if __name__ == "__main__":
    sys.exit(main())
