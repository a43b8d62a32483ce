"""Tasks of lm-eval on a model under a configuration, offline."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from adapmoe_lab.assets import TEXT_VARIABLE, data_folder, text_folder
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.texts import read_lines
from adapmoe_lab.records import TunedConfig

MINIMAL_PAIRS = "minimal_pairs"
BLIMP = "blimp"
PAIRS_PER_PARADIGM = 20


def evaluate(
    model: LabModel,
    config: TunedConfig | None = None,
    tasks: Sequence[str] = (MINIMAL_PAIRS,),
    *,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, Mapping[str, float]]:
    """Run lm-eval tasks and return their metrics by task.

    Args:
        model: the model to run; experts are read from the store, gating applies.
        config: the configuration to run under; the present one if None.
        tasks: `"minimal_pairs"` (shipped), `"blimp"` (from `$ADAPMOE_LAB_DATA`, the first
            20 pairs of every paradigm), or any task name lm-eval knows.
        limit: at most this many examples per task.
        batch_size: sequences per forward pass.

    Raises:
        FileNotFoundError: the data of a task is not there.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepared = [_task(name, folder) for name in tasks]
        stack.enter_context(model.running(config))
        stack.enter_context(model.engine.reading_store())
        harness = HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=batch_size)
        results = simple_evaluate(
            model=harness, tasks=prepared, limit=limit, log_samples=False, bootstrap_iters=0
        )
    if results is None:
        raise RuntimeError("lm-eval returned no results; run it on the first process only.")
    return {name: _metrics(values) for name, values in results["results"].items()}


def _task(name: str, folder: Path) -> str | dict[str, Any]:
    """Return what lm-eval should run for a task name, with our own data as local files."""
    if name == MINIMAL_PAIRS:
        return _pairs_task(name, data_folder() / "evaluation" / "minimal_pairs.jsonl")
    if name != BLIMP:
        return name
    text = text_folder()
    source = text / "blimp" / "blimp.jsonl.gz" if text else None
    if source is None or not source.exists():
        raise FileNotFoundError(
            f"The blimp task needs blimp/blimp.jsonl.gz in the folder that ${TEXT_VARIABLE} names; "
            f"it is {'not set' if text is None else text}. data/README.md tells its layout."
        )
    taken: dict[str, int] = {}
    subset = folder / "blimp.jsonl"
    with subset.open("w", encoding="utf-8") as file:
        for line in read_lines(source):
            paradigm = json.loads(line)["UID"]
            taken[paradigm] = taken.get(paradigm, 0) + 1
            if taken[paradigm] <= PAIRS_PER_PARADIGM:
                file.write(line + "\n")
    return _pairs_task(name, subset)


def _pairs_task(name: str, path: Path) -> dict[str, Any]:
    """Return a task that asks which sentence of each pair {good, bad} is likelier."""
    if not path.exists():
        raise FileNotFoundError(f"The {name} task needs {path}.")
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return lm-eval's `metric,filter` entries under the metric's own name."""
    return {
        key.split(",")[0]: value
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }
