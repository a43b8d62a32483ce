"""What a captured step is able to serve; asked before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from adapmoe_lab.engine.executor import Capabilities
from adapmoe_lab.engine.store.expert_store import ExpertStore
from adapmoe_lab.models.capturable import NOT_CAPTURED
from adapmoe_lab.policies.eviction.registry import POLICIES

OLDEST_TRITON = (3, 3)
"""Named tuples in kernels came with it."""

PRECISIONS = ("bfloat16", "float16")
"""What it computes in."""

MATRICES = ("gate_up_proj", "down_proj")
"""What an expert must consist of."""

REMEDY = "Load the model with executor='host', which runs everything."


class CaptureError(RuntimeError):
    """A step cannot be captured, or a replay does something else."""


class PolicyError(CaptureError):
    """An eviction policy cannot be followed on the device."""


def capabilities(dtype: str) -> Capabilities:
    """Return what a captured step is able to run, with every policy that is registered by now.

    Experts are to be stored in `dtype`, which the model computes in.
    """
    return Capabilities(
        "graph",
        precisions=(dtype,),
        evictions=[name for name, policy in POLICIES.items() if not policy.host_only],
        has_prefetch=False,
    )


def reason_of(error: Exception) -> str:
    """Return what an error says is not possible, without what to do about it."""
    return str(error).split(". ")[0].removesuffix(".")


def check_computing(device: torch.device, dtype: str) -> None:
    """Refuse a device on which no step can be captured, and another precision than the kernels'.

    Raises:
        ValueError: it is no CUDA device, triton is not there or too old, or it is to compute in
            another precision.
    """
    if device.type != "cuda":
        raise ValueError(f"executor='graph' needs a CUDA device; this is {device}. {REMEDY}")
    if find_spec("triton") is None:
        raise ValueError(f"executor='graph' needs triton, which is not installed. {REMEDY}")
    _check_triton()
    if dtype not in PRECISIONS:
        raise ValueError(
            f"executor='graph' computes in {' or '.join(PRECISIONS)}, not in {dtype}; give "
            f"dtype='bfloat16'. {REMEDY}"
        )


def check_capturable(model_type: str) -> None:
    """Refuse a family of which it is known that its steps cannot be captured.

    Raises:
        ValueError: with the reason.
    """
    if model_type in NOT_CAPTURED:
        raise ValueError(
            f"executor='graph' cannot serve {model_type}: {NOT_CAPTURED[model_type]}. {REMEDY}"
        )


def _check_triton() -> None:
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        raise ValueError(
            f"executor='graph' needs triton {oldest} or newer, as torch 2.7 brings it; this is "
            f"{triton.__version__}. {REMEDY}"
        )


def check_experts(store: ExpertStore) -> None:
    """Refuse experts that a captured step cannot serve, by name.

    Raises:
        ValueError: the GPU cannot read them, or they are of another kind.
    """
    layout, reasons = store.formats[0][0], []
    if not store.buffer(0, 0).is_pinned():
        reasons.append("the GPU reads experts in pinned host memory only, and these are not")
    names = tuple(field.name for field in layout.fields)
    if names != MATRICES:
        reasons.append(f"it serves experts of {' and '.join(MATRICES)}, these are of {names}")
    if any(field.transposed for field in layout.fields):
        reasons.append("it serves matrices [output, input], these are transposed")
    if any(expert != layout for experts in store.formats for expert in experts):
        reasons.append("it serves experts of one layout, these differ")
    if reasons:
        raise ValueError(
            f"executor='graph' cannot serve this model: {'; '.join(reasons)}. {REMEDY}"
        )
