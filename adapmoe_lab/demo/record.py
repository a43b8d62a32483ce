"""The training record: what a demo model was trained on, how, on what, and how it went."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from adapmoe_lab.demo.corpus import DEVELOPMENT_SHARE, HELD_OUT_SHARE, Domain
from adapmoe_lab.demo.publish import write_lines
from adapmoe_lab.demo.recipe import Recipe
from adapmoe_lab.demo.trainer import CurvePoint, TrainingResult

RECORD_NAME = "training_record.json"
CURVE_NAME = "loss_curve.csv"


@dataclass(frozen=True)
class RunFacts:
    """Everything that a training record is written from."""

    domains: Sequence[Domain]
    training_tokens: Mapping[str, int]
    recipe: Recipe
    result: TrainingResult
    n_parameters: int
    text: Path
    device: str


def write_training_record(folder: Path, facts: RunFacts) -> None:
    """Write `training_record.json`."""
    result = facts.result
    sources = read_sources(facts.text)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "n_parameters": facts.n_parameters,
        "architecture": asdict(facts.recipe.architecture),
        "recipe": facts.recipe.as_dict(),
        "splits": {"held_out_share": HELD_OUT_SHARE, "development_share": DEVELOPMENT_SHARE},
        "domains": {d.name: _describe(d, facts, sources.get(d.name, {})) for d in facts.domains},
        "run": {
            **describe_machine(facts.device),
            "n_steps": result.n_steps,
            "n_tokens": result.n_tokens,
            "seconds": round(result.seconds, 1),
            "tokens_per_s": round(result.n_tokens / result.seconds),
        },
        "final": {
            "training_loss": result.curve[-1].training_loss,
            "development_loss": result.curve[-1].development_loss,
            "development_loss_by_domain": result.development_loss_by_domain,
        },
    }
    write_lines(folder / RECORD_NAME, [json.dumps(record, indent=2, ensure_ascii=False)])


def write_loss_curve(folder: Path, curve: Sequence[CurvePoint]) -> None:
    """Write `loss_curve.csv`, one row per point, columns named like the fields of `CurvePoint`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(CurvePoint))
    writer.writerows(
        [f"{value:.6g}" if isinstance(value, float) else value for value in asdict(point).values()]
        for point in curve
    )
    write_lines(folder / CURVE_NAME, text.getvalue().splitlines())


def describe_machine(device: str) -> dict[str, object]:
    """Return the hardware behind a torch device and the versions of what ran on it."""
    on_cuda = torch.device(device).type == "cuda"
    hardware = torch.cuda.get_device_name(device) if on_cuda else _processor()
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {
        "hardware": hardware,
        "n_cpu_cores": os.cpu_count(),
        "compute_dtype": "bfloat16" if on_cuda else "float32",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def read_sources(text: Path) -> dict[str, dict[str, str]]:
    """Return {domain: {title, source, licence}} from the table in the text folder's README, if any.

    Rows are `| title | folder/ | source | licence |`.
    """
    readme = text / "README.md"
    if not readme.is_file():
        return {}
    rows = re.findall(
        r"^\| *([^|]+?) *\| *([^|/]+)/ *\| *([^|]+?) *\| *([^|]+?) *\|$",
        readme.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return {
        folder.strip(): {"title": title, "source": source, "licence": licence}
        for title, folder, source, licence in rows
    }


def _describe(domain: Domain, facts: RunFacts, source: dict[str, str]) -> dict[str, object]:
    return {
        **source,
        "files": [asdict(file) for file in domain.files],
        "n_documents": {
            "training": len(domain.training),
            "development": len(domain.development),
            "held_out": len(domain.held_out),
        },
        "training_bytes": domain.n_training_bytes,
        "training_tokens": facts.training_tokens[domain.name],
        "epochs": facts.result.epochs_by_domain[domain.name],
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = re.findall(r"^model name\s*: (.+)$", information.read_text(), re.MULTILINE)
        if names:
            return names[0]
    return platform.processor() or platform.machine()
