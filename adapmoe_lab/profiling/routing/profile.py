"""Profiling: run texts through a model and keep the routing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.texts import Texts, as_labels, as_texts
from adapmoe_lab.profiling.project import TRACES, check_project, project_folder, report
from adapmoe_lab.profiling.routing.recorder import RoutingRecorder
from adapmoe_lab.records import Predictors, RecordError, RoutingTrace
from adapmoe_lab.records.arguments import whole_number
from adapmoe_lab.records.files import digest
from adapmoe_lab.records.progress import Progress
from adapmoe_lab.records.routing import SCHEMA_VERSION

MAX_TOKENS = 512


def profile(
    model: LabModel,
    texts: Texts,
    *,
    labels: str | Iterable[str] | None = None,
    max_tokens: int = MAX_TOKENS,
    predictors: Predictors | None = None,
    n_candidates: int | None = None,
    project: str | Path | None = None,
    reuse: bool = True,
    progress: Progress | None = None,
) -> RoutingTrace:
    """Record the routing of texts, or reuse the recording of an earlier run.

    The model runs each text in one forward pass under its present gating and compensation. The
    trace is kept in the project folder under a name made of the model, what its experts are stored
    and computed in, the texts, those two and the predictors; when it is found there it is read
    instead, and a note says so. If it cannot be kept after all, as on a full disk, a note says
    that, and the trace is returned.

    Args:
        model: the model to run.
        texts: one sequence each, or texts by their labels.
        labels: one per text; numbered if None.
        max_tokens: longer texts are cut to this many tokens.
        predictors: fitted predictors whose predictions are recorded too.
        n_candidates: experts recorded of each prediction; the router's K if None.
        project: the project folder, see `profiling.project.project_folder`.
        reuse: whether an earlier recording may be returned.
        progress: called with (done, total, text); what it raises stops the run.

    Raises:
        RecordError: the predictors were fitted to another model.
        ValueError: there is no text, or an empty one, or something else; labels are not as many;
            or no candidate is to be recorded.
        OSError: the project folder cannot be written; nothing was recorded.
    """
    sequences, labels = _checked(model, texts, labels, max_tokens)
    if predictors is not None:
        predictors.check_model(model.spec)
    n_candidates = model.spec.top_k if n_candidates is None else n_candidates
    n_candidates = whole_number("n_candidates", n_candidates, 1, model.spec.n_experts)
    name = digest(
        str(SCHEMA_VERSION),
        model.spec.fingerprint(),
        model.spec.precision.fingerprint(),
        str(model.hf.dtype),
        model.engine.skipping,
        predictors.fingerprint() if predictors is not None else "none fitted",
        str(n_candidates),
        *(ids.numpy().tobytes() for ids in sequences),
        *labels,
    )
    path = project_folder(project) / TRACES / f"{name}.npz"
    kept = _kept(path) if reuse else None
    if kept is not None:
        return kept
    check_project(project)
    with torch.no_grad(), model.running(), model.engine.reading_store():
        recorder = RoutingRecorder(model, model.predictors(predictors), n_candidates)
        with recorder.recording():
            for done, ids in enumerate(sequences):
                if progress is not None:
                    progress(done, len(sequences), "recording routing")
                model.hf(input_ids=ids[None].to(model.engine.device), use_cache=False)
    trace = recorder.trace(labels)
    _keep(trace, path)
    return trace


def _checked(
    model: LabModel, texts: Texts, labels: str | Iterable[str] | None, max_tokens: int
) -> tuple[list[torch.Tensor], list[str]]:
    """Return the token ids int64 [T] and the label of every text; refuse what is none."""
    max_tokens = whole_number("max_tokens", max_tokens, at_least=1)
    listed = as_texts(texts)
    if not listed:
        raise ValueError("profile needs at least one text.")
    labels = as_labels(labels, texts, len(listed))
    sequences = [model.encode(text)[:max_tokens] for text in listed]
    if any(not len(ids) for ids in sequences):
        raise ValueError("profile was given an empty text; every text needs at least one token.")
    return sequences, labels


def _kept(path: Path) -> RoutingTrace | None:
    """Return the trace of an earlier run, with a note; None if there is none that can be read."""
    if not path.exists():
        return None
    try:
        trace = RoutingTrace.load(path)
    except RecordError as error:
        report(f"Recording again, since the kept trace cannot be read: {error}")
        return None
    report(f"Reused the trace of {trace.n_tokens} tokens kept at {path}; reuse=False records.")
    return trace


def _keep(trace: RoutingTrace, path: Path) -> None:
    """Keep a trace for the next run, as far as there is room, and note it."""
    try:
        trace.save(path)
    except OSError as error:
        report(f"Recorded {trace.n_tokens} tokens; not kept, {path} could not be written: {error}")
    else:
        report(f"Recorded {trace.n_tokens} tokens; kept at {path}.")
