"""How a byte budget becomes slots per layer."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records import CachePlan, MoESpec

N_STAGING = 2
"""Slots through which uncached experts stream: one is filled while the other is read."""

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def budget_bytes(
    expert_memory: str | float | None, spec: MoESpec, argument: str = "expert_memory"
) -> int:
    """Return a memory budget in bytes.

    Args:
        expert_memory: bytes, a size such as `"8GiB"`, a share of all experts' stored bytes such
            as `"40%"`, or None for all experts.
        spec: the model whose experts are meant.
        argument: what an error calls the budget.

    Raises:
        ValueError: the text is not a size.
    """
    if expert_memory is None:
        return spec.all_experts_bytes
    if isinstance(expert_memory, int | float):
        return int(expert_memory)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[KMG]?i?B)\s*", expert_memory)
    if match is None or match[2] not in {"%", *UNITS}:
        raise ValueError(
            f"{argument}={expert_memory!r} is not a size: give bytes, or text such as "
            "'8GiB', '300MB' or '40%'."
        )
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return int(number / 100 * spec.all_experts_bytes)
    return int(number * UNITS[unit])


def uniform_plan(
    spec: MoESpec,
    budget: int,
    min_slots: int = 1,
    slot_bytes: NDArray[np.int64] | None = None,
    surrogate_bytes: int = 0,
) -> CachePlan:
    """Divide a byte budget evenly over the layers.

    Surrogates come out of the budget first, then the staging slots, unless every expert fits.
    Slots left over after an even division go to the first layers.

    Args:
        spec: the model whose experts are meant.
        budget: bytes for slots, surrogates and staging.
        min_slots: slots every layer must get.
        slot_bytes: int64 [L], bytes of a slot of each layer where experts differ in precision.
        surrogate_bytes: bytes of the surrogates that stand in for skipped experts.

    Raises:
        ValueError: the budget does not give every layer `min_slots`.
    """
    n_layers, n_experts = spec.n_layers, spec.n_experts
    if slot_bytes is None:
        slot_bytes = np.full(n_layers, spec.stored_expert_bytes)
    widest, all_layers = int(slot_bytes.max()), int(slot_bytes.sum())
    whole_room = budget - surrogate_bytes
    room = whole_room - N_STAGING * widest
    if whole_room >= n_experts * all_layers:
        slots = np.full(n_layers, n_experts)
    elif room < min_slots * all_layers:
        beside = f" and {surrogate_bytes / 2**20:.1f} MiB of surrogates" if surrogate_bytes else ""
        n_slots = max(0, room // widest)
        short = -(-(min_slots * all_layers - room) // widest)
        raise ValueError(
            f"{n_slots} slots cannot give {n_layers} layers {min_slots} each; raise the "
            f"budget by {short} experts ({short * widest / 2**20:.1f} MiB, staging of "
            f"{N_STAGING}{beside} included) or pass min_slots=0."
        )
    else:
        each, left = divmod(max(0, room), all_layers)
        slots = each + (np.cumsum(slot_bytes) <= left)
    return CachePlan(
        slots=np.minimum(slots, n_experts),
        slot_bytes=slot_bytes,
        budget_bytes=budget,
        method="uniform",
    )


def slots_plan(spec: MoESpec, slots_per_layer: int) -> CachePlan:
    """Give every layer the same number of slots, whatever budget that takes."""
    if not 0 <= slots_per_layer <= spec.n_experts:
        raise ValueError(
            f"slots_per_layer must lie in 0..{spec.n_experts} (the experts of a layer), got "
            f"{slots_per_layer}."
        )
    staging = 0 if slots_per_layer == spec.n_experts else N_STAGING
    n_slots = slots_per_layer * spec.n_layers + staging
    return CachePlan(
        slots=np.full(spec.n_layers, slots_per_layer),
        slot_bytes=np.full(spec.n_layers, spec.stored_expert_bytes),
        budget_bytes=n_slots * spec.stored_expert_bytes,
        method="uniform",
    )
