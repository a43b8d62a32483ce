"""The kernels of a captured step as operators, which a compiler sees as single calls.

What an operator changes it declares, so that a compiled forward neither copies nor reorders it; the
slots alone, which `served_product` writes through their addresses, no tensor of a forward shows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from adapmoe_lab.engine.graph.device_functions import device_function
from adapmoe_lab.engine.graph.product_kernel import served_product_kernel
from adapmoe_lab.engine.graph.requirements import PolicyError
from adapmoe_lab.engine.graph.step_kernel import step_kernel
from adapmoe_lab.policies.eviction.policy import EvictionPolicy
from adapmoe_lab.records.files import digest
from adapmoe_lab.simulation.code_digest import code_digest

EXPERTS_PER_WARP = 1024
"""How many experts of a pool a warp looks through."""
ROWS_AT_ONCE, COLUMNS_AT_ONCE = 4, 1024

_POLICIES: dict[str, tuple[EvictionPolicy, dict[str, Any]]] = {}
"""Policies that were prepared, and the arguments that make `step_kernel` theirs, by their code.

An operator is given no more than a string.
"""


class Decision(NamedTuple):
    """What is to be done in a one-token step of a layer, see `step_kernel`.

    Attributes:
        reads: int64 [K], where the experts are read.
        writes: int64 [K], the slots they are written through to.
        columns: int32 [K], their places in the router's choice.
        coefficients: float32 [K], what outputs are weighted by, in the order of the choice.
        dropped: float32 [K], the weights of experts that are skipped, else zero.
    """

    reads: torch.Tensor
    writes: torch.Tensor
    columns: torch.Tensor
    coefficients: torch.Tensor
    dropped: torch.Tensor


def prepare_policy(policy: EvictionPolicy) -> str:
    """Make a policy known to `decide`; return by what it is told apart.

    Triton until 3.6 tells functions apart by their text alone, not by the constants that they read,
    and keeps compiled kernels on the disk; their digest tells them apart.

    Raises:
        PolicyError: its functions cannot be compiled.
    """
    names = ("after_use", "on_new_step", "on_scores")
    present = {name: getattr(policy, name) for name in names if getattr(policy, name) is not None}
    try:
        compiled = {name: device_function(function) for name, function in present.items()}
        code = digest(*(f"{name} {code_digest(function)}" for name, function in present.items()))
    except ValueError as error:  # triton reads a function's text, too
        raise _not_compiled(policy) from error
    _POLICIES[code] = policy, {**dict.fromkeys(names), **compiled, "code": code}
    return code


def policy_arguments(code: str) -> dict[str, Any]:
    """Return the arguments of `step_kernel` that make it a policy's, which was prepared."""
    return _POLICIES[code][1]


def _not_compiled(policy: EvictionPolicy) -> PolicyError:
    return PolicyError(
        f"Eviction {policy.name!r} needs the host: its functions are not plain arithmetic, written "
        "in a file, that compiles for the device. Use the host-driven executor, or another policy."
    )


def _decided(ids: torch.Tensor, weights: torch.Tensor, *_: Any) -> Decision:
    """Return what `decide` fills, empty."""
    of_k = [ids.new_empty(ids.shape, dtype=kind) for kind in (torch.int64, torch.int64)]
    columns = ids.new_empty(ids.shape, dtype=torch.int32)
    floats = [ids.new_empty(ids.shape, dtype=torch.float32) for _ in range(2)]
    return Decision(*of_k, columns, *floats)


def _decide(
    ids: torch.Tensor, weights: torch.Tensor, scores: torch.Tensor | None,
    cuts: torch.Tensor, gating: torch.Tensor, slot_of: torch.Tensor, priority: torch.Tensor,
    is_pinned: torch.Tensor, clocks: torch.Tensor, free_slots: torch.Tensor, n_free: torch.Tensor,
    counters: torch.Tensor, host_addresses: torch.Tensor, slot_addresses: torch.Tensor,
    is_rehearsal: torch.Tensor, policy: str, layer: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    decision = _decided(ids, weights)
    (n_layers, n_experts), (n_pools, n_places) = slot_of.shape, slot_addresses.shape
    n_shared = n_layers if n_pools == 1 else 1
    n_all, top_k, padded = n_shared * n_experts, len(ids), triton.next_power_of_2
    n_warps = min(16, padded(triton.cdiv(n_all, EXPERTS_PER_WARP)))
    try:
        step_kernel[(1,)](
            ids, weights, weights if scores is None else scores, cuts, gating, slot_of, priority,
            is_pinned, clocks, free_slots, n_free, *counters, host_addresses, slot_addresses,
            *decision, is_rehearsal, layer, n_shared, n_experts, n_places, top_k,
            padded(n_experts), padded(n_all), padded(top_k), **policy_arguments(policy),
            num_warps=n_warps, enable_fp_fusion=False,
        )  # fmt: skip
    except triton.TritonError as error:
        raise _not_compiled(_POLICIES[policy][0]) from error
    return tuple(decision)


decide = torch.library.custom_op(
    "adapmoe_lab::decide",
    _decide,
    mutates_args=("slot_of", "priority", "clocks", "n_free", "counters"),
    schema="(Tensor ids, Tensor weights, Tensor? scores, Tensor cuts, Tensor gating, "
    "Tensor(a!) slot_of, Tensor(b!) priority, Tensor is_pinned, Tensor(c!) clocks, "
    "Tensor free_slots, Tensor(d!) n_free, Tensor(e!) counters, Tensor host_addresses, "
    "Tensor slot_addresses, Tensor is_rehearsal, str policy, int layer) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
"""Decide a one-token step of a layer and change residency and counters; see `step_kernel`.

Returns the tensors of a `Decision`. `policy` is what `prepare_policy` returned.
"""
decide.register_fake(lambda *arguments: tuple(_decided(*arguments)))


def _product_of(columns: torch.Tensor, x: torch.Tensor, n_rows: int) -> torch.Tensor:
    return x.new_empty((len(columns), n_rows))


def _served_product(
    reads: torch.Tensor, writes: torch.Tensor, columns: torch.Tensor, x: torch.Tensor,
    offset: int, n_rows: int, n_columns: int,
) -> torch.Tensor:  # fmt: skip
    out = _product_of(columns, x, n_rows)
    grid = triton.cdiv(n_rows, ROWS_AT_ONCE), len(columns)
    served_product_kernel[grid](
        reads, writes, columns, offset, x, 0 if len(x) == 1 else n_columns, out, n_rows, n_columns,
        ROWS_AT_ONCE, min(COLUMNS_AT_ONCE, triton.next_power_of_2(n_columns)), num_warps=4,
    )  # fmt: skip
    return out


served_product = torch.library.custom_op(
    "adapmoe_lab::served_product",
    _served_product,
    mutates_args=(),
    schema="(Tensor reads, Tensor writes, Tensor columns, Tensor x, int offset, int n_rows, "
    "int n_columns) -> Tensor",
)
"""Multiply a matrix [N, D] of each expert with its vector, [1, D] or [K, D]; return [K, N].

`offset` counts numbers before the matrix. See `served_product_kernel`.
"""
served_product.register_fake(
    lambda reads, writes, columns, x, offset, n_rows, n_columns: _product_of(columns, x, n_rows)
)
