"""Bringing a checkpoint's experts where a memory plan wants them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from adapmoe_lab.engine.load_arguments import ExpertDtype
from adapmoe_lab.engine.memory_plan import MemoryPlan
from adapmoe_lab.engine.store.checksums import ChecksumManifest, kept_manifest
from adapmoe_lab.engine.store.expert_buffer import plain_views, write_expert
from adapmoe_lab.engine.store.expert_store import DiskStore, ExpertStore, Formats, HostStore
from adapmoe_lab.engine.store.index import (
    STORE_VERSION,
    StoreIndex,
    check_room,
    is_prepared,
    read_index,
)
from adapmoe_lab.engine.store.on_disk import open_store, save_store
from adapmoe_lab.models.checkpoint.byte_progress import byte_progress
from adapmoe_lab.models.checkpoint.checkpoint import Checkpoint
from adapmoe_lab.models.checkpoint.meta_model import DTYPES, MetaModel
from adapmoe_lab.records import MoESpec, PartialIdentityWarning, precision_named
from adapmoe_lab.records.files import digest
from adapmoe_lab.records.user_warning import warn_user

MOST_THREADS = 4
WORKING_COPIES = 2
"""Copies of an expert, as it is computed with, that reading and packing it takes."""


def expert_formats(
    model: MetaModel, expert_dtype: ExpertDtype, stored: StoreIndex | None = None
) -> Formats:
    """Return the layout of every expert, [L][E].

    Args:
        model: the model.
        expert_dtype: a name, `"auto"` for the checkpoint's own, or a name per expert.
        stored: what a prepared store says of itself, whose precisions `"auto"` then means.

    Raises:
        ValueError: no such precision, or not one per expert.
    """
    counts = [layer.n_experts for layer in model.layers]
    if expert_dtype == "auto" and stored is not None:
        names: Sequence[Sequence[str]] = stored.precisions.names or ()
    elif isinstance(expert_dtype, str):
        name = model.stored_as if expert_dtype == "auto" else expert_dtype
        names = [[precision_named(name).name] * n_experts for n_experts in counts]
    else:
        names = [[precision_named(name).name for name in layer] for layer in expert_dtype]
    if [len(layer) for layer in names] != counts:
        raise ValueError(
            f"expert_dtype names {sum(map(len, names))} precisions in {len(names)} layers; "
            f"{model.name} has {len(counts)} layers of {counts[0]} experts. Give one name for "
            "all of them, or a list per layer with one name per expert."
        )
    known = {
        (layer, name): model.expert_format(layer, name)
        for layer, in_layer in enumerate(names)
        for name in set(in_layer)
    }
    return [[known[layer, name] for name in in_layer] for layer, in_layer in enumerate(names)]


def check_store(store: Path, stored: StoreIndex | None, formats: Formats) -> None:
    """Refuse a store that cannot be opened, or cannot be written, for all but its weights.

    Args:
        store: its folder.
        stored: what it says of itself; None if it is to be written.
        formats: how each expert is to be stored.

    Raises:
        CheckpointError: it holds experts stored otherwise, or is damaged.
        OSError: it cannot be written there.
    """
    if stored is not None:
        stored.check_layout(formats)
    else:
        check_room(store, formats)


def store_identity(checkpoint: Checkpoint, spec: MoESpec, stored: StoreIndex) -> str:
    """Return what a prepared store must be of: the model's weights.

    Stores of versions up to 0.1 know a part of the weights only; such a store is taken with a
    warning where that part is the same.
    """
    if stored.identity == spec.fingerprint():
        return stored.identity
    with closing(checkpoint.reader()) as reader:
        partial = digest(spec.partial_fingerprint() or "", reader.sample_digest())
    if stored.identity != partial:
        return spec.fingerprint()
    warn_user(
        f"{stored.folder} was prepared by a version that told models apart by a part of their "
        f"weights. That part is the same in {spec.model_id!r}; whether the rest is is not known. "
        "Prepare the store again to be sure.",
        PartialIdentityWarning,
    )
    return partial


def open_experts(
    checkpoint: Checkpoint,
    formats: Formats,
    spec: MoESpec,
    plan: MemoryPlan,
    store: Path | None,
    stored: StoreIndex | None = None,
) -> ExpertStore:
    """Return the experts of a checkpoint: in host memory if they fit, else read when asked for.

    Args:
        checkpoint: where they come from.
        formats: how each is stored.
        spec: the model they belong to.
        plan: whether host memory holds them all, and how much of it may be used.
        store: a prepared store to open, or to write first; None for none.
        stored: what that store says of itself; None if it is to be written.
    """
    if store is not None:
        return _open_prepared(checkpoint, formats, spec, plan, store, stored)
    buffers = CheckpointRows(checkpoint, formats, plan.device)
    if not plan.fits_host:
        manifest = _manifest_of(checkpoint, formats, spec, plan.device)
        return DiskStore(formats, buffers, manifest, plan.host_bytes, on_close=buffers.close)
    one_plain = checkpoint.model.expert_format(0, checkpoint.model.dtype).n_bytes
    with closing(buffers):
        experts = _in_memory(formats, buffers, plan, WORKING_COPIES * one_plain)
        checkpoint.index.check_unchanged()
        return experts


class CheckpointRows:
    """Reads experts out of a checkpoint's files into buffers, packing them on the way."""

    def __init__(self, checkpoint: Checkpoint, formats: Formats, device: torch.device) -> None:
        """Read in the given formats; matrices are packed on `device`."""
        self._reader = checkpoint.reader()
        self._dtype = DTYPES[checkpoint.model.dtype]
        self._formats = formats
        self._device = device

    def __call__(self, layer: int, expert: int, buffer: torch.Tensor) -> None:
        """Fill a buffer uint8 [n] with an expert."""
        layout = self._formats[layer][expert]
        room = plain_views(buffer, layout, self._dtype)
        tensors = self._reader.read(layer, expert, self._dtype, into=room)
        label = f"Expert {expert} of MoE layer {layer}"
        write_expert(buffer, layout, tensors, label, self._device)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


def _open_prepared(
    checkpoint: Checkpoint,
    formats: Formats,
    spec: MoESpec,
    plan: MemoryPlan,
    store: Path,
    stored: StoreIndex | None,
) -> ExpertStore:
    """Open a prepared store, written first if it is not there; pin it if a GPU is to read it."""
    if stored is None:
        _prepare(checkpoint, formats, spec, plan, store)
        stored = read_index(store)
    prepared = open_store(stored, store_identity(checkpoint, spec, stored), formats)
    if plan.device.type == "cuda" and plan.fits_host:
        widest = int(prepared.expert_bytes.max())
        return _in_memory(formats, _copy_buffers(prepared), plan, widest)
    return prepared


def _prepare(
    checkpoint: Checkpoint, formats: Formats, spec: MoESpec, plan: MemoryPlan, store: Path
) -> None:
    """Write a prepared store, unless another process does so meanwhile."""
    buffers = CheckpointRows(checkpoint, formats, plan.device)
    unseen = ChecksumManifest(np.full(_shape(formats), -1), str(checkpoint.folder))
    streamed = DiskStore(formats, buffers, unseen, cache_bytes=0, on_close=buffers.close)
    check = checkpoint.index.check_unchanged
    with closing(streamed), byte_progress("Preparing experts", plan.store_bytes) as advance:
        try:
            save_store(streamed, store, spec.fingerprint(), advance, check)
        except FileExistsError:
            if not is_prepared(store):
                raise


def _manifest_of(
    checkpoint: Checkpoint, formats: Formats, spec: MoESpec, device: torch.device
) -> ChecksumManifest:
    """Return the manifest of this folder's weights as they are stored here; a copy has its own.

    So have weights that were written anew. What the weights are is known by the size and time of
    their files, so that damage that leaves both as they were is found by this manifest. Packed
    bytes depend on their layout and on what was packed from, where, and by which torch.
    """
    how = (str(STORE_VERSION), checkpoint.model.dtype, device.type, torch.__version__)
    place = str(checkpoint.folder.resolve())
    identity = digest(place, spec.fingerprint(), repr(formats), *how)
    return kept_manifest(identity, _shape(formats), str(checkpoint.folder))


def _copy_buffers(source: ExpertStore) -> Callable[[int, int, torch.Tensor], None]:
    def copy_buffer(layer: int, expert: int, buffer: torch.Tensor) -> None:
        buffer.copy_(source.buffer(layer, expert))

    return copy_buffer


def _in_memory(
    formats: Formats,
    write: Callable[[int, int, torch.Tensor], None],
    plan: MemoryPlan,
    working_bytes: int,
) -> HostStore:
    """Fill a store, as many experts at once as leaves their temporaries a tenth of it."""
    experts = HostStore(formats, pinned=plan.device.type == "cuda")
    affordable = experts.n_bytes // 10 // working_bytes
    n_threads = max(1, min(MOST_THREADS, os.cpu_count() or 1, affordable))
    try:
        with byte_progress("Loading experts", plan.store_bytes) as advance:
            experts.fill(write, advance, n_threads)
    except BaseException:
        experts.close()
        raise
    return experts


def _shape(formats: Formats) -> tuple[int, int]:
    return len(formats), max(len(layer) for layer in formats)
