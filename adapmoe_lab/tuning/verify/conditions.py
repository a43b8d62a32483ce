"""When, with what and on what a verification ran."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from adapmoe_lab.engine.lab_model import LabModel
from adapmoe_lab.evaluation.conditions import measurement_conditions
from adapmoe_lab.models.support import family_class
from adapmoe_lab.records import TunedConfig
from adapmoe_lab.records.files import digest

PACKAGES = ("adapmoe-lab", "torch", "transformers", "numpy", "numba", "safetensors", "triton")


def verify_conditions(model: LabModel, config: TunedConfig, texts: Sequence[str]) -> dict[str, Any]:
    """Return everything that a reader of a report has to know beside its numbers.

    A model folder is named without the folders it lies in.
    """
    spec = model.spec
    is_folder = Path(spec.model_id).expanduser().is_dir()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_installed()},
        "machine": _machine(model.engine.device),
        "model": {
            "name": Path(spec.model_id).name if is_folder else spec.model_id,
            "fingerprint": spec.fingerprint(),
            "revision": spec.revision,
            "family": spec.family,
            "family_class": family_class(spec.family),
            "layers": spec.n_layers,
            "experts": spec.n_experts,
            "top_k": spec.top_k,
            "experts_stored_in": str(spec.precision),
            "all_experts_bytes": spec.all_experts_bytes,
        },
        "config": {
            "fingerprint": config.fingerprint(),
            "sections": config.section_fingerprints(),
            "eviction": config.eviction,
            "slots": config.plan.n_slots if config.plan is not None else None,
        },
        "measured_under": measurement_conditions(model),
        "texts": {"n": len(texts), "digest": digest(*texts)},
    }


def _installed() -> dict[str, str | None]:
    """Return the versions of the packages that decide what is computed; None if not installed."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "cuda": torch.version.cuda}


def _machine(device: torch.device) -> dict[str, Any]:
    memory = psutil.virtual_memory()
    on_device = None
    if device.type == "cuda":
        on_device = torch.cuda.get_device_properties(device).total_memory
    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "host_memory_bytes": memory.total,
        "host_free_bytes": memory.available,
        "device_memory_bytes": on_device,
    }
