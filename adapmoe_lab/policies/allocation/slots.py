"""How a budget becomes slots per layer."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.records import CachePlan, MoESpec

N_STAGING = 2
"""Slots through which uncached experts stream: one is filled while the other is read."""

EVENNESS = 1e-12
"""Cost of a squared slot against the most expensive layer's: settles ties and nothing else."""

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
        ValueError: it is not a size, or less than a byte.
    """
    if expert_memory is None:
        return spec.all_experts_bytes
    number, unit = check_size(argument, expert_memory)
    if unit == "%":
        return int(number / 100 * spec.all_experts_bytes)
    return int(number * UNITS[unit])


def check_size(argument: str, size: Any) -> tuple[float, str]:
    """Return the number and the unit of a size, `"%"` or one of `UNITS`; bytes are whole numbers.

    Raises:
        ValueError: it is not a size, or less than a byte.
    """
    number, unit = None, "B"
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[KMG]?i?B)?\s*", size)
        if match is not None and (match[2] or "B") in {"%", *UNITS}:
            number, unit = float(match[1]), match[2] or "B"
    elif isinstance(size, Real) and not isinstance(size, bool) and math.isfinite(size):
        number = float(size)
    if number is None or number < 0:
        raise ValueError(
            f"{argument}={size!r} is not a size: give bytes, or text such as '8GiB', '300MB' or "
            "'40%'."
        )
    if unit == "B" and 0 < number < 1:
        raise ValueError(
            f"{argument}={size!r} is less than a byte; a share of all experts' bytes is text, "
            f"such as '{100 * number:g}%'."
        )
    return number, unit


def uniform_plan(
    spec: MoESpec,
    budget: int,
    min_slots: int = 1,
    beside_bytes: int = 0,
) -> CachePlan:
    """Divide a byte budget evenly over the layers.

    Surrogates come out of the budget first, then the staging slots, unless every expert fits.
    Slots left over after an even division go to the first layers.

    Args:
        spec: the model whose experts are meant.
        budget: bytes for slots, surrogates and staging.
        min_slots: slots every layer must get.
        beside_bytes: bytes of what lies in the same room: surrogates, a prefetch buffer.

    Raises:
        ValueError: the budget does not give every layer `min_slots`.
    """
    n_layers, n_experts, slot_bytes = spec.n_layers, spec.n_experts, spec.slot_bytes
    widest, all_layers = int(slot_bytes.max()), int(slot_bytes.sum())
    whole_room = budget - beside_bytes
    room = whole_room - N_STAGING * widest
    if whole_room >= n_experts * all_layers:
        slots = np.full(n_layers, n_experts)
    elif room < min_slots * all_layers:
        beside = f" and {beside_bytes / 2**20:.1f} MiB beside it" if beside_bytes else ""
        n_slots = max(0, room // widest)
        short = -(-(min_slots * all_layers - room) // widest)
        raise ValueError(
            f"{n_slots} slots cannot give {n_layers} layers {min_slots} each; raise the "
            f"budget by {short} experts ({short * widest / 2**20:.1f} MiB, staging of "
            f"{N_STAGING}{beside} included)."
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
    all_layers = int(spec.slot_bytes.sum())
    return CachePlan(
        slots=np.full(spec.n_layers, slots_per_layer),
        slot_bytes=spec.slot_bytes,
        budget_bytes=slots_per_layer * all_layers + staging * spec.stored_expert_bytes,
        method="uniform",
    )


def plan_slots(
    total_slots: int,
    *,
    n_experts: int = 8,
    single_expert_ratio: ArrayLike | None = None,
    prefetch_accuracy: ArrayLike | None = None,
    miss_curves: ArrayLike | None = None,
    miss_cost: ArrayLike | None = None,
    method: str = "adapmoe",
) -> CachePlan:
    """Divide slots of equal size over layers so that the fewest loads are waited for.

    No model is needed. A layer may get no slot at all: its experts are then streamed.

    Args:
        total_slots: slots to give away, all of them.
        n_experts: experts per layer, for `"adapmoe"`.
        single_expert_ratio: [L], share of tokens run with one expert, for `"adapmoe"`; None for
            no gating.
        prefetch_accuracy: [L], share of the needed experts that prefetch brings in time; None for
            no prefetch.
        miss_curves: float [L, E+1], misses per token with 0..E slots, as `lab.miss_curves` measures
            them, for `"measured"`.
        miss_cost: [L], what a miss of each layer costs against the others, for `"measured"`; None
            for the same everywhere.
        method: `"adapmoe"`, its model of a top-2 router with uniform residency
            (arXiv 2408.10284, section 4.3), or `"measured"`.

    Returns:
        A plan with the loads per token that are expected of each layer, those prefetched left out.

    Raises:
        ValueError: the method is unknown, what it needs is missing or of the wrong form, or there
            are more slots than experts.
    """
    if method == "adapmoe":
        if single_expert_ratio is None and prefetch_accuracy is None:
            raise ValueError(
                "method='adapmoe' needs single_expert_ratio or prefetch_accuracy, one per layer."
            )
        loads = adapmoe_loads(n_experts, single_expert_ratio, prefetch_accuracy)
        weights = np.ones(len(loads))
    elif method == "measured":
        if miss_curves is None:
            raise ValueError(
                "method='measured' needs miss_curves; lab.miss_curves(trace) measures them."
            )
        curves = np.asarray(miss_curves, dtype=np.float64)
        n_layers = len(curves)
        loads = curves * (1 - _per_layer("prefetch_accuracy", prefetch_accuracy, n_layers, 0.0))
        weights = _per_layer("miss_cost", miss_cost, n_layers, 1.0)[:, 0]
    else:
        raise ValueError(f"method={method!r} is unknown; expected 'adapmoe' or 'measured'.")
    slots = cheapest_slots(loads * weights[:, None], total_slots)
    return CachePlan(
        slots=slots,
        slot_bytes=None,
        budget_bytes=None,
        method=method,
        expected_loads=loads[np.arange(len(slots)), slots],
    )


def adapmoe_loads(
    n_experts: int,
    single_expert_ratio: ArrayLike | None = None,
    prefetch_accuracy: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Return the loads per token that AdapMoE expects of each layer with 0..N slots, [L, N+1].

    With a the share of tokens run with one expert, b the prefetch accuracy, t slots for N experts,
    and P2, P1 the chances that both or one of two experts are missing:
    a (1 - t/N)(1 - b) + (1 - a)(2 P2 (1 - b) + P2 b + P1 (1 - b)), arXiv 2408.10284, section 4.3.
    """
    if n_experts < 2:
        raise ValueError(f"AdapMoE's model takes two experts or more per layer, got {n_experts}.")
    given = single_expert_ratio if single_expert_ratio is not None else prefetch_accuracy
    n_layers = len(np.atleast_1d(np.asarray(given)))
    a = _per_layer("single_expert_ratio", single_expert_ratio, n_layers, 0.0)
    b = _per_layer("prefetch_accuracy", prefetch_accuracy, n_layers, 0.0)
    n, t = n_experts, np.arange(n_experts + 1)
    both = (n - t) * (n - t - 1) / (n * (n - 1))
    one = 2 * t * (n - t) / (n * (n - 1))
    of_two = 2 * both * (1 - b) + both * b + one * (1 - b)
    return a * (1 - t / n) * (1 - b) + (1 - a) * of_two


def cheapest_slots(costs: NDArray[np.float64], total_slots: int) -> NDArray[np.int64]:
    """Return the slots [L] that cost least together, by AdapMoE's dynamic program.

    Exact for every curve; where all are convex, giving each slot to the layer that gains most by
    it comes to the same. Of divisions that cost the same, the most even one is taken.

    Args:
        costs: float64 [L, E+1], what a layer costs with 0..E slots.
        total_slots: slots to give away.

    Raises:
        ValueError: there are fewer or more of them than the layers can take.
    """
    n_layers, n_choices = costs.shape
    most = n_layers * (n_choices - 1)
    if not 0 <= total_slots <= most:
        raise ValueError(
            f"total_slots must lie in 0..{most} ({n_layers} layers of {n_choices - 1} experts), "
            f"got {total_slots}."
        )
    unevenness = EVENNESS * np.abs(costs).max() * np.arange(n_choices) ** 2
    best = np.full(total_slots + 1, np.inf)
    best[0] = 0.0
    chosen = []
    for layer in costs + unevenness:
        padded = np.concatenate([np.full(n_choices - 1, np.inf), best])
        left = np.lib.stride_tricks.sliding_window_view(padded, total_slots + 1)[::-1]
        together = left + layer[:, None]  # [E+1, total_slots+1]: this layer's slots, all slots
        chosen.append(together.argmin(axis=0))
        best = together.min(axis=0)
    slots = np.zeros(n_layers, dtype=np.int64)
    for layer in reversed(range(n_layers)):
        slots[layer] = chosen[layer][total_slots - slots[layer + 1 :].sum()]
    return slots


def shared(plan: CachePlan) -> CachePlan:
    """Return a plan whose slots all layers share: as many as the layers had, if all are as wide.

    Slots of a pool are as wide as the widest expert of the model, so where layers differ a pool
    has fewer.
    """
    if plan.slot_bytes is None:
        return replace(plan, is_global=True, expected_loads=None)
    widest = int(plan.slot_bytes.max())
    n_slots, n_layers = int((plan.slots * plan.slot_bytes).sum()) // widest, len(plan.slots)
    return replace(
        plan,
        slots=n_slots // n_layers + (np.arange(n_layers) < n_slots % n_layers),
        slot_bytes=np.full(n_layers, widest),
        expected_loads=None,
        is_global=True,
    )


def with_pins(plan: CachePlan, uses: ArrayLike) -> CachePlan:
    """Return a plan that pins the most used experts into all its slots.

    Args:
        plan: the slots, per layer or shared.
        uses: [L, E], how often each expert was used; ties go to the lowest layer and id.
    """
    uses = np.asarray(uses)
    ranked = np.argsort(-uses, axis=None, kind="stable")
    pinned: list[list[int]] = [[] for _ in plan.slots]
    left = [plan.pool_slots(pool) for pool in range(plan.n_pools)]
    for layer, expert in zip(*np.unravel_index(ranked, uses.shape), strict=True):
        pool = 0 if plan.is_global else layer
        if left[pool] > 0:
            left[pool] -= 1
            pinned[layer].append(int(expert))
    return replace(plan, pinned=tuple(map(tuple, pinned)))


def _per_layer(
    name: str, values: ArrayLike | None, n_layers: int, default: float
) -> NDArray[np.float64]:
    """Return values as a column [L, 1]."""
    if values is None:
        return np.full((n_layers, 1), default)
    column = np.asarray(values, dtype=np.float64)
    if column.shape != (n_layers,):
        raise ValueError(f"{name} must hold {n_layers} numbers, one per layer, got {column.shape}.")
    return column[:, None]
