"""Tasks of lm-eval on a model under a configuration, offline."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

from adapmoe_lab.assets import TEXT_VARIABLE, data_folder, text_folder
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.texts import read_records
from adapmoe_lab.models.checkpoint.configuration import one_line
from adapmoe_lab.records import TunedConfig
from adapmoe_lab.records.arguments import strings, whole_number
from adapmoe_lab.records.standard_error import none_if_unknown

MINIMAL_PAIRS = "minimal_pairs"
BLIMP = "blimp"
PAIRS_PER_PARADIGM = 20
BOOTSTRAP_DRAWS = 1000
"""For the errors of metrics that have no formula for theirs; lm-eval draws as many at once."""
N_SIMILAR = 5
NOT_AVAILABLE = "N/A"
"""What lm-eval says where it knows no standard error."""


@dataclass(frozen=True, eq=False)
class OpenTasks:
    """Tasks that lm-eval knows and whose data is there.

    Attributes:
        specs: what lm-eval is to run: names, or our own tasks as it describes them.
        manager: its index of all tasks it knows, built once.
    """

    specs: tuple[str | dict[str, Any], ...]
    manager: Any


def evaluate(
    model: LabModel,
    config: TunedConfig | None = None,
    tasks: str | Iterable[str] | OpenTasks = (MINIMAL_PAIRS,),
    *,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, Mapping[str, float | None]]:
    """Run lm-eval tasks and return their metrics by task.

    Beside each metric stands its standard error, as `acc_stderr` beside `acc`; None if lm-eval
    gives none, as for a single example. A metric that a task has with several filters is named with
    each, as `exact_match,strict-match`.

    Args:
        model: the model to run; experts are read from the store, gating applies.
        config: the configuration to run under; the present one if None.
        tasks: `"minimal_pairs"` (shipped), `"blimp"` (from `$ADAPMOE_LAB_DATA`, the first
            20 pairs of every paradigm), any task name lm-eval knows, or what `open_tasks` gave.
        limit: at most this many examples per task.
        batch_size: sequences per forward pass.

    Raises:
        FileNotFoundError: the data of a task is not there.
        ValueError: lm-eval knows no such task, or cannot open it; or a number is out of range.
    """
    limit = whole_number("limit", limit, at_least=1) if limit is not None else None
    batch_size = whole_number("batch_size", batch_size, at_least=1)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with ExitStack() as stack:
        if not isinstance(tasks, OpenTasks):
            tasks = stack.enter_context(open_tasks(tasks))
        stack.enter_context(model.running(config))
        stack.enter_context(model.engine.reading_store())
        harness = HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=batch_size)
        results = simple_evaluate(
            model=harness,
            tasks=list(tasks.specs),
            task_manager=tasks.manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP_DRAWS,
        )
    if results is None:
        raise RuntimeError("lm-eval returned no results; run it on the first process only.")
    return {name: _metrics(values) for name, values in results["results"].items()}


@contextmanager
def open_tasks(names: str | Iterable[str]) -> Iterator[OpenTasks]:
    """Open tasks by name, for `evaluate` within the block; so that what fails, fails at once.

    Raises:
        FileNotFoundError: the data of one of our own tasks is not there.
        ValueError: there is no task, one is unknown, or lm-eval cannot open it.
    """
    from lm_eval.tasks import TaskManager

    listed = strings("tasks", names)
    if not listed:
        raise ValueError(f"evaluate needs at least one task, such as {MINIMAL_PAIRS!r}.")
    with tempfile.TemporaryDirectory() as folder:
        specs = tuple(_spec(name, Path(folder)) for name in listed)
        manager = TaskManager(include_defaults=any(isinstance(spec, str) for spec in specs))
        for name, spec in zip(listed, specs, strict=True):
            _check_opens(manager, name, spec)
        yield OpenTasks(specs, manager)


def _check_opens(manager: Any, name: str, spec: str | dict[str, Any]) -> None:
    """Open a task with its data, and say of what stops lm-eval which task it is."""
    if isinstance(spec, str) and spec not in manager.all_tasks and not Path(spec).is_file():
        known = [MINIMAL_PAIRS, *manager.all_tasks]
        similar = get_close_matches(name, known, N_SIMILAR, cutoff=0.5)
        advice = f"Close to it: {', '.join(similar)}." if similar else f"Try {MINIMAL_PAIRS!r}."
        raise ValueError(f"lm-eval knows no task {name!r}. {advice} `lm-eval ls tasks` lists all.")
    opened = manager.load if hasattr(manager, "load") else manager.load_task_or_group  # 0.4.11
    try:
        opened([spec])
    except Exception as error:  # whatever the task's own code and its data's reader raise
        raise ValueError(
            f"lm-eval cannot open the task {name!r}: {one_line(error)} "
            "Its data must be in the cache of Hugging Face datasets, or the hub within reach."
        ) from error


def _spec(name: str, folder: Path) -> str | dict[str, Any]:
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
            f"it is {'not set' if text is None else text}. data/README.md describes its layout."
        )
    taken: dict[str, int] = {}
    subset = folder / "blimp.jsonl"
    with subset.open("w", encoding="utf-8") as file:
        for number, record in read_records(source):
            missing = {"UID", "good", "bad"} - set(record)
            if missing:
                raise ValueError(f"{source}, line {number}: lacks {', '.join(sorted(missing))}.")
            paradigm = record["UID"]
            taken[paradigm] = taken.get(paradigm, 0) + 1
            if taken[paradigm] <= PAIRS_PER_PARADIGM:
                file.write(json.dumps(record) + "\n")
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


def _metrics(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Return lm-eval's `metric,filter` entries by metric, with the filter where there are more.

    Standard errors, `metric_stderr,filter`, may be `N/A`.
    """
    entries = {
        key: value
        for key, value in values.items()
        if "," in key and (isinstance(value, Real) or value == NOT_AVAILABLE)
    }
    metrics = Counter(key.split(",")[0] for key in entries)
    return {
        metric if metrics[metric := key.split(",")[0]] == 1 else key: none_if_unknown(
            value if isinstance(value, Real) else None
        )
        for key, value in entries.items()
    }
