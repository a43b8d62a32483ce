"""The model card: what a demo model is and what it is worth, written from its two records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapmoe_lab.demo.measurements import MEASUREMENTS_NAME
from adapmoe_lab.demo.publish import write_lines
from adapmoe_lab.demo.record import CURVE_NAME, RECORD_NAME
from adapmoe_lab.models.demo_architecture import FAMILIES, DemoArchitecture

CARD_NAME = "README.md"


def write_card(folder: Path) -> None:
    """Write the card of a folder that holds a training record and measurements."""
    record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    measured = json.loads((folder / MEASUREMENTS_NAME).read_text(encoding="utf-8"))
    parts = (
        _introduction(record),
        _quality(measured),
        _routing(measured["routing"]),
        _training(record),
        _data(record["domains"]),
        _samples(measured["samples"]),
    )
    write_lines(folder / CARD_NAME, "\n\n".join(parts).splitlines())


def _introduction(record: Mapping[str, Any]) -> str:
    shape = DemoArchitecture(**record["architecture"])
    family = FAMILIES[shape.family].title
    if shape == DemoArchitecture():
        heading = "The demo model"
        purpose = (
            "It exists so that every page of this project works on a real trained "
            "Mixture-of-Experts model without a download."
        )
        loading = (
            "Plain transformers loads this folder too: "
            "`AutoModelForCausalLM.from_pretrained('data/demo')`."
        )
    else:
        heading = f"A {family} beside the demo model"
        purpose = (
            "It is trained as the demo model was, so that methods can be compared on more than "
            "one model."
        )
        loading = (
            "Its weights are not committed: the command in `data/README.md` makes them again, in "
            "a folder that `lab.load` and plain transformers load."
        )
    return (
        f"# {heading}\n\n"
        f"A {family} of {record['n_parameters'] / 1e6:.1f}M parameters: {shape.n_layers} layers, "
        f"{shape.n_experts} experts, top-{shape.top_k}, hidden size {shape.hidden_size}, "
        f"byte-level BPE of {shape.vocabulary_size} tokens, up to {shape.max_positions} "
        f"positions, bfloat16. {purpose} It writes short simple text; it knows nothing and must "
        f"not be asked for facts.\n\n{loading}"
    )


def _quality(measured: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            f"{loss['nats_per_token']:.3f} ± {loss['standard_error']:.3f}",
            f"{loss['nats_per_byte']:.3f}",
            f"{loss['n_tokens']:,}",
        )
        for name, loss in measured["held_out"].items()
    ]
    rows.append(("**mean over domains**", f"**{measured['mean_nats_per_token']:.3f}**", "", ""))
    lines = [
        "## Quality",
        "",
        "Loss on held-out text, windows of 512 tokens; ± is one standard error over windows. "
        f"Computed in {measured['conditions']['compute_dtype']} on "
        f"{measured['conditions']['hardware']}.",
        "",
        _table(("held-out text", "nats/token", "nats/byte", "tokens"), rows),
    ]
    for key, title in (("minimal_pairs", "the shipped minimal pairs"), ("blimp", "BLiMP")):
        if key in measured:
            score = measured[key]
            lines += ["", f"On {score['n_pairs']:,} pairs of {title}: {score['accuracy']:.1%}."]
    return "\n".join(lines)


def _routing(routing: Mapping[str, Any]) -> str:
    rows = [
        (
            str(layer),
            "–" if recall is None else f"{recall:.2f}",
            f"{local:.2f}",
            f"{chance:.2f}",
            f"{min(use):.1%}",
            f"{max(use):.1%}",
        )
        for layer, (recall, local, chance, use) in enumerate(
            zip(
                routing["next_router_recall"],
                routing["locality"],
                routing["locality_by_chance"],
                routing["expert_use"],
                strict=True,
            )
        )
    ]
    header = ("layer", "next-router recall", "locality", "by chance", "least used", "most used")
    return (
        "## Routing\n\n"
        "On the same text, every domain weighing alike. *Next-router recall*: share of the layer's "
        "experts found by applying its router to the input of the layer before. *Locality*: share "
        "of a token's experts that the token before used too, and what independent choices from "
        "the same distribution would give. *Least / most used*: share of the layer's tokens that "
        f"use the expert.\n\n{_table(header, rows)}"
    )


def _training(record: Mapping[str, Any]) -> str:
    run, recipe = record["run"], record["recipe"]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return (
        "## Training\n\n"
        f"{run['n_tokens'] / 1e6:,.0f}M tokens in {run['n_steps']:,} steps, "
        f"{run['seconds'] / 60:.1f} minutes on {run['hardware']} "
        f"({run['tokens_per_s'] / 1e3:,.0f}k tokens/s), {record['date']}; {versions}. "
        "AdamW, peak learning rate "
        f"{recipe['learning_rate']}, dropout {recipe['dropout']} on embeddings and block outputs, "
        f"load-balancing weight {recipe['balance_weight']} per layer. Every choice is in "
        f"`{RECORD_NAME}`, the loss curve in `{CURVE_NAME}`, all measurements in "
        f"`{MEASUREMENTS_NAME}`. The command, and how to train on other text, is in "
        "`data/README.md`."
    )


def _data(domains: Mapping[str, Any]) -> str:
    rows = [
        (
            domain.get("title", name),
            f"{domain['training_tokens'] / 1e6:.2f}M",
            f"{domain['epochs']:.1f}",
            domain.get("source", "–"),
            domain.get("licence", "–"),
        )
        for name, domain in domains.items()
    ]
    header = ("text", "tokens", "times read", "source", "licence")
    return (
        "## Training text\n\n"
        "Whole documents are held out for measuring and a further hundredth for choosing the "
        f"recipe; neither is trained on.\n\n{_table(header, rows)}"
    )


def _samples(samples: Mapping[str, str]) -> str:
    lines = ["## Samples", "", "First draw, nucleus sampling (temperature 0.8, top-p 0.95)."]
    for name, text in samples.items():
        lines += ["", f"{name}:", "", "```text", *text.splitlines(), "```"]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
