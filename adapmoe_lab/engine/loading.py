"""Loading a model ready to run offloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch

from adapmoe_lab.assets import data_folder
from adapmoe_lab.engine.config_checks import check_eviction, check_precision, parts_of_one_model
from adapmoe_lab.engine.executor import Executor
from adapmoe_lab.engine.graph.requirements import (
    capabilities,
    check_capturable,
    check_computing,
    reason_of,
)
from adapmoe_lab.engine.host_driven.executor import HostDrivenExecutor
from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.engine.load_arguments import (
    ExpertDtype,
    LoadRequest,
    check_function,
    optional_text,
)
from adapmoe_lab.engine.memory_plan import MemoryPlan, memory_needs, plan_memory
from adapmoe_lab.engine.store.builder import check_store, expert_formats, open_experts
from adapmoe_lab.engine.store.expert_store import ExpertStore, Formats
from adapmoe_lab.engine.store.index import StoreIndex, find_store
from adapmoe_lab.engine.transfer.clock import Clock, RealClock
from adapmoe_lab.engine.transfer.link import NO_LINK, CudaLink, EmulatedLink, Link
from adapmoe_lab.models.checkpoint.checkpoint import (
    Checkpoint,
    open_checkpoint,
    partial_identity,
    routed_weights,
)
from adapmoe_lab.models.checkpoint.meta_model import DTYPES, MetaModel, describe
from adapmoe_lab.models.families import Router, served_layers
from adapmoe_lab.models.hooks.experts_hook import ExpertsHook
from adapmoe_lab.records import LinkTarget, MoESpec, TunedConfig, load_targets


def load(
    name: str | PathLike[str],
    *,
    config: TunedConfig | str | PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    expert_dtype: ExpertDtype | torch.dtype = "auto",
    expert_memory: str | float | None = None,
    host_memory: str | float | None = None,
    store: str | PathLike[str] | None = None,
    revision: str | None = None,
    max_context_tokens: int | None = None,
    batch_size: int = 1,
    link: str | None = None,
    clock: Clock | None = None,
    executor: str = "host",
    compile_steps: bool = False,
    announce: Callable[[str], None] = print,
) -> LabModel:
    """Load a Mixture-of-Experts model whose experts stay in host memory or on disk.

    What goes where is planned and announced before anything is allocated. Only safetensors files
    are read, and no code that comes with a model is run.

    Args:
        name: `"demo"`, a folder that `save_pretrained` wrote, or a hub id.
        config: a tuned config, or the file of one, to run under.
        device: where to compute; CUDA where there is one, else the CPU.
        dtype: precision to compute in: `"auto"`, `"bfloat16"`, `"float16"` or `"float32"`, or
            torch's dtypes of these names; so in `expert_dtype`.
        expert_dtype: precision to store and move experts in: `"auto"` as the config or the store
            says, else as they come, `"bfloat16"`, `"int8"`, `"int4"`, `"int3"`, `"int2"`, or one
            name per expert, [L][E].
        expert_memory: room for experts on the device, with staging and surrogates: bytes,
            `"8GiB"` or `"40%"`; None for what is left.
        host_memory: host memory for experts, their slots included on the CPU; None for what is
            free. Experts beyond it stay in their files and are read when they are needed.
        store: folder of a prepared store, opened if it is there, else written first.
        revision: branch, tag or commit of a hub id.
        max_context_tokens: longest text to leave room for; None for 4096 or the model's longest.
        batch_size: sequences at once to leave room for.
        link: on the CPU, the named target whose link is emulated (`data/targets.json`), `"none"`
            for no emulation, None for the default target. A GPU always uses its real link.
        clock: what time is read from; a `VirtualClock` makes runs exactly repeatable.
        executor: what runs the experts: `"host"`, which runs everything; `"graph"`, which replays
            one captured CUDA graph per token, of experts as they are computed in, in pinned memory
            and not prefetched; or `"auto"`, a graph where that can run, else the host, and says
            why.
        compile_steps: whether the forward of a captured step is compiled first: steps are faster,
            the first takes some 20 seconds, or fewer where the same was compiled before.
        announce: is told the memory plan.

    Raises:
        FileNotFoundError: no such model or config.
        UnsupportedModelError: the model has no experts that can be served.
        CheckpointError: its files, or those of the store, are incomplete, damaged or changed.
        OSError: the store cannot be written.
        MemoryError: it does not fit; the text says what does.
        ValueError: an argument is out of range; the text says what was expected.
    """
    if config is not None and expert_memory is not None:
        raise ValueError("Give either a config, which has its own cache plan, or expert_memory.")
    wanted = LoadRequest.of(
        name=name,
        config=config,
        device=device,
        dtype=dtype,
        expert_dtype=expert_dtype,
        expert_memory=expert_memory,
        host_memory=host_memory,
        store=store,
        revision=revision,
        max_context_tokens=max_context_tokens,
        batch_size=batch_size,
        executor=executor,
        compile_steps=compile_steps,
    )
    target = link_target(optional_text("link", link), wanted.device)
    check_function("announce", announce)
    planned = _planned(wanted)
    announce(f"{planned.spec.model_id} {planned.memory}")
    model = _assembled(wanted, planned, target, clock if clock is not None else RealClock())
    if model.engine.why_not_replayed is not None:
        announce(f"steps are driven by the host: {model.engine.why_not_replayed}")
    return model


@dataclass(frozen=True, eq=False)
class _Planned:
    """What is known of a model before anything is allocated.

    Attributes:
        checkpoint: its files.
        tokenizer: its tokenizer.
        stored: the prepared store, if there is one.
        formats: how every expert will be stored.
        spec: its shape, without the identity of its weights.
        memory: what goes where.
    """

    checkpoint: Checkpoint
    tokenizer: Any
    stored: StoreIndex | None
    formats: Formats
    spec: MoESpec
    memory: MemoryPlan


def _planned(wanted: LoadRequest) -> _Planned:
    """Read headers and configuration, and plan the memory."""
    config, folder = wanted.config, wanted.store
    if config is not None:
        check_eviction(config)
    stored = find_store(folder) if folder is not None else None
    checkpoint = open_checkpoint(wanted.name, wanted.dtype, wanted.revision)
    tokenizer = checkpoint.load_tokenizer()
    if config is not None:
        _check_shape(config, checkpoint.model)
    formats = expert_formats(checkpoint.model, wanted.expert_dtype, stored)
    if folder is not None:
        check_store(folder, stored, formats)
    spec = describe(checkpoint.model, formats)
    if config is not None:
        check_precision(config, spec)
    if wanted.executor == "graph":
        check_computing(wanted.device, checkpoint.model.dtype)
        check_capturable(checkpoint.model.config.model_type)
        able = capabilities(checkpoint.model.dtype)
        able.check(config or TunedConfig.untuned(spec), spec.precision)
    needs = memory_needs(
        checkpoint.model, spec.top_k, wanted.device, wanted.max_context_tokens, wanted.batch_size
    )
    memory = plan_memory(
        spec,
        needs,
        wanted.device,
        expert_memory=wanted.expert_memory,
        host_memory=wanted.host_memory,
        slots=config.plan if config is not None else None,
        surrogate_bytes=_surrogate_bytes(config, checkpoint),
        prefetch_bytes=_prefetch_bytes(config, spec),
    )
    return _Planned(checkpoint, tokenizer, stored, formats, spec, memory)


def _assembled(
    wanted: LoadRequest, planned: _Planned, target: LinkTarget | None, clock: Clock
) -> LabModel:
    """Load everything into the places that were planned, and put the config in force."""
    config, checkpoint, memory = wanted.config, planned.checkpoint, planned.memory
    identity = checkpoint.identity()
    hf = checkpoint.load_skeleton()
    layers = served_layers(hf, checkpoint.model.layers)
    routed = routed_weights(hf, layers)
    spec = describe(checkpoint.model, planned.formats, routed, identity, partial_identity(hf))
    for part in parts_of_one_model(config) if config is not None else []:
        part.check_model(spec)
    hf.to(wanted.device)  # pyright: ignore[reportArgumentType]
    store = open_experts(checkpoint, planned.formats, spec, memory, wanted.store, planned.stored)
    try:
        hook, routers = ExpertsHook(hf, layers), [layer.router for layer in layers]
        link = _real_or_free_link(wanted.device, clock)
        host = HostDrivenExecutor(store, link, clock, wanted.device, hf.dtype, routers)
        engine = _engine(wanted, planned, host, store, routers)
        hook.attach(engine)
        model = LabModel(planned.tokenizer, spec, hook, engine, store, link, memory)
        if target is not None:
            model.emulate_link(target)
        model.put_in_force(
            config if config is not None else replace(model.config, plan=memory.slots)
        )
    except BaseException:
        store.close()
        raise
    return model


def _engine(
    wanted: LoadRequest,
    planned: _Planned,
    host: HostDrivenExecutor,
    store: ExpertStore,
    routers: Sequence[Router],
) -> Executor:
    """Return what is to run the experts: the host, or captured steps beside it.

    Raises:
        ValueError: captured steps were asked for and cannot serve the model.
    """
    if wanted.executor == "host":
        return host
    spec, dtype, is_auto = planned.spec, planned.checkpoint.model.dtype, wanted.executor == "auto"
    try:
        check_computing(wanted.device, dtype)
        check_capturable(planned.checkpoint.model.config.model_type)
        capabilities(dtype).check(TunedConfig.untuned(spec), spec.precision)
        from adapmoe_lab.engine.graph.executor import GraphExecutor  # only it needs triton

        context_tokens = planned.memory.needs.context_tokens
        return GraphExecutor(
            host, store, spec.top_k, context_tokens, routers, is_auto, wanted.compile_steps
        )
    except ValueError as error:
        if not is_auto:
            raise
        host.why_not_replayed = reason_of(error)
        return host


def _check_shape(config: TunedConfig, model: MetaModel) -> None:
    """Refuse a config for a model of another shape before anything is made of its plans."""
    shape = len(model.layers), model.layers[0].n_experts
    if shape != (config.model["n_layers"], config.model["n_experts"]):
        config.check_model(describe(model, expert_formats(model, "auto")))


def _surrogate_bytes(config: TunedConfig | None, checkpoint: Checkpoint) -> int:
    """Return the device bytes of a config's surrogates, in the precision that is computed in."""
    if config is None or config.compensation is None:
        return 0
    return config.compensation.n_bytes(DTYPES[checkpoint.model.dtype].itemsize)


def _prefetch_bytes(config: TunedConfig | None, spec: MoESpec) -> int:
    """Return the device bytes of what a config prefetches."""
    if config is None or config.prefetch is None:
        return 0
    return config.prefetch.n_bytes(spec.stored_expert_bytes)


def link_target(link: str | None, device: torch.device) -> LinkTarget | None:
    """Return the target that a `link` argument names, or None for a real link or none at all.

    Raises:
        ValueError: no such target, or the device has a link of its own.
    """
    if device.type == "cuda":
        if link is not None:
            raise ValueError(f"link={link!r} emulates a link; on {device} the real one is used.")
        return None
    if link == NO_LINK:
        return None
    targets = load_targets(data_folder() / "targets.json")
    if link is None:
        return next(iter(targets.values()))
    if link not in targets:
        known = ", ".join(repr(name) for name in [*targets, NO_LINK])
        raise ValueError(f"link={link!r} is unknown; expected one of {known}.")
    return targets[link]


def known_targets() -> list[str]:
    """Return the names of the link targets that can be emulated, the default first."""
    return list(load_targets(data_folder() / "targets.json"))


def _real_or_free_link(device: torch.device, clock: Clock) -> Link:
    return CudaLink(device, clock) if device.type == "cuda" else EmulatedLink(NO_LINK, clock)
