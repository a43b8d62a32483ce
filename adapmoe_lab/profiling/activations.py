"""What every layer's experts are given while texts run, kept on disk so that memory stays small."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.layer_pass import LayerGradient, LayerPass
from adapmoe_lab.engine.observing import observing
from adapmoe_lab.models.families import check_each_runs_once
from adapmoe_lab.profiling.sensitivity.backward import backpropagate
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.progress import Progress


@dataclass(frozen=True, eq=False)
class LayerActivations:
    """One layer's share of T recorded tokens.

    Attributes:
        hidden: the experts' input [T, D], in the precision of the model.
        indices: the router's choice, int64 [T, K]; E means no expert.
        weights: the router's own weights, float32 [T, K].
        gradient: gradient [T, D] of the summed loss at the experts' output, if it was recorded.
    """

    hidden: torch.Tensor
    indices: NDArray[np.int64]
    weights: NDArray[np.float32]
    gradient: torch.Tensor | None


class Activations:
    """Everything that was recorded, one layer at a time; the bulk lies in files of a folder."""

    def __init__(self, folder: Path, n_layers: int) -> None:
        """Record into an empty folder."""
        self._folder = folder
        self._routing: list[list[tuple[NDArray, NDArray]]] = [[] for _ in range(n_layers)]
        self._kinds: dict[str, tuple[torch.dtype, int]] = {}

    def add(self, seen: LayerPass | LayerGradient) -> None:
        """Append what a layer was given, and the gradient at its output if there is one."""
        weights = seen.weights
        if isinstance(weights, torch.Tensor):
            weights = weights.detach().float().cpu().numpy()
        self._routing[seen.layer].append((seen.indices.copy(), weights))
        self._append(seen.layer, "hidden", seen.hidden)
        if isinstance(seen, LayerGradient):
            self._append(seen.layer, "gradient", seen.gradient)

    def layer(self, layer: int) -> LayerActivations:
        """Read one layer back."""
        indices, weights = zip(*self._routing[layer], strict=True)
        return LayerActivations(
            hidden=self._read(layer, "hidden"),
            indices=np.concatenate(indices),
            weights=np.concatenate(weights),
            gradient=self._read(layer, "gradient") if "gradient" in self._kinds else None,
        )

    def _append(self, layer: int, kind: str, tensor: torch.Tensor) -> None:
        rows = tensor.detach().cpu().contiguous()
        self._kinds[kind] = rows.dtype, rows.shape[1]
        with self._path(layer, kind).open("ab") as file:
            file.write(memoryview(rows.view(torch.uint8).numpy()))

    def _read(self, layer: int, kind: str) -> torch.Tensor:
        dtype, width = self._kinds[kind]
        content = bytearray(self._path(layer, kind).read_bytes())
        return torch.frombuffer(content, dtype=dtype).view(-1, width)

    def _path(self, layer: int, kind: str) -> Path:
        return self._folder / f"{layer}.{kind}"


@contextmanager
def recorded_activations(
    model: LabModel,
    sequences: Sequence[torch.Tensor],
    *,
    gradients: bool = False,
    progress: Progress | None = None,
) -> Iterator[Activations]:
    """Run token sequences under the configuration in force; forget what was recorded at the end.

    Takes T x L x D numbers of disk in the temporary folder, twice that with gradients.

    Args:
        model: the model; its experts are read from the store.
        sequences: token ids int64 [T] of each.
        gradients: whether to record the gradient of each sequence's summed next-token loss too.
        progress: called with (done, total, text); what it raises stops the run.

    Raises:
        UnsupportedModelError: some layers run several times for each token.
        OSError: the temporary folder has no room for that much.
    """
    check_each_runs_once(model.layers)
    with tempfile.TemporaryDirectory(prefix="adapmoe-lab-") as folder:
        _check_room(model, sum(map(len, sequences)), 2 if gradients else 1, Path(folder))
        activations = Activations(Path(folder), model.spec.n_layers)
        with model.engine.reading_store():
            for done, ids in enumerate(sequences):
                if progress is not None:
                    progress(done, len(sequences), "recording activations")
                if gradients:
                    backpropagate(model, ids, activations.add)
                else:
                    _record(model, ids, activations)
        yield activations


def _check_room(model: LabModel, n_tokens: int, n_kinds: int, folder: Path) -> None:
    """Refuse to begin what the disk has no room for."""
    per_token = model.spec.n_layers * model.spec.hidden_size * model.hf.dtype.itemsize
    needed, free = n_kinds * n_tokens * per_token, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"Recording {n_tokens:,} tokens takes {needed / 2**20:,.0f} MiB in {folder.parent}, "
            f"where {free / 2**20:,.0f} MiB are free. Give fewer or shorter texts, or set "
            "TMPDIR to a folder with more room."
        )


def _record(model: LabModel, ids: torch.Tensor, activations: Activations) -> None:
    with torch.no_grad(), observing(model, {HookPoint.EXPERTS_OUTPUT: activations.add}):
        model.hf(input_ids=ids[None].to(model.engine.device), use_cache=False)
