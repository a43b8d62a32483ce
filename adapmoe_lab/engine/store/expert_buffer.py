"""An expert as bytes, and its bytes as tensors."""

from __future__ import annotations

import warnings

import torch

from adapmoe_lab.engine.quantised.packed import PackedMatrix
from adapmoe_lab.engine.quantised.quantise import pack_mxfp4, quantise
from adapmoe_lab.models.checkpoint.number_formats import ExpertTensors, Mxfp4Matrix
from adapmoe_lab.models.experts import Weights
from adapmoe_lab.records import ExpertFormat
from adapmoe_lab.records.expert_format import Field


def write_expert(
    buffer: torch.Tensor,
    layout: ExpertFormat,
    tensors: ExpertTensors,
    label: str,
    device: torch.device | None = None,
) -> None:
    """Store an expert's tensors in its buffer, packing what the layout wants packed.

    Args:
        buffer: uint8 [layout.n_bytes] on the host.
        layout: where each tensor goes and how.
        tensors: the tensors as the experts module holds them.
        label: what a warning calls the expert.
        device: where to pack; None for the host.
    """
    for field in layout.fields:
        target = buffer[field.offset : field.offset + field.n_bytes]
        value = tensors[field.name]
        if isinstance(value, Mxfp4Matrix):
            _write_microscaled(target, field, value)
            continue
        value = _finite_or_warn(value, field, label)
        if field.precision.is_packed:
            matrix = (value.t() if field.transposed else value).to(device)
            target.copy_(quantise(matrix, field.precision).data)
        else:
            plain = _plain_view(target, field)
            if value.data_ptr() != plain.data_ptr():
                plain.copy_(value)


def plain_views(
    buffer: torch.Tensor, layout: ExpertFormat, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the tensors of a buffer that are stored unpacked in a precision, to be filled."""
    return {
        field.name: _plain_view(buffer[field.offset : field.offset + field.n_bytes], field)
        for field in layout.fields
        if not field.precision.is_packed and getattr(torch, field.precision.name) == dtype
    }


def expert_views(buffer: torch.Tensor, layout: ExpertFormat) -> Weights:
    """Return an expert's weights as they lie in a buffer, on any device, without copying."""
    weights = {}
    for field in layout.fields:
        data = buffer[field.offset : field.offset + field.n_bytes]
        if field.precision.is_packed:
            weights[field.name] = PackedMatrix(field.precision, field.matrix_shape, data)
        else:
            weights[field.name] = _plain_view(data, field)
    return weights


def plain_tensors(
    buffer: torch.Tensor, layout: ExpertFormat, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return an expert's tensors in the module's shapes and a plain precision, as copies."""
    tensors = {}
    for field, weight in zip(layout.fields, expert_views(buffer, layout).values(), strict=True):
        if isinstance(weight, torch.Tensor):
            tensors[field.name] = weight.to(dtype, copy=True)
        else:
            dense = weight.dequantise(dtype)
            tensors[field.name] = dense.t().contiguous() if field.transposed else dense
    return tensors


def _write_microscaled(target: torch.Tensor, field: Field, value: Mxfp4Matrix) -> None:
    packed = pack_mxfp4(value.blocks, value.scales, field.matrix_shape[1])
    if field.precision.name == "mxfp4":
        target.copy_(packed.data)
        return
    dense = packed.dequantise(torch.bfloat16)
    if field.precision.is_packed:
        quantise(dense, field.precision, out=target)
    else:
        _plain_view(target, field).copy_(dense.t() if field.transposed else dense)


def _plain_view(data: torch.Tensor, field: Field) -> torch.Tensor:
    return data.view(getattr(torch, field.precision.name)).view(field.shape)


def _finite_or_warn(value: torch.Tensor, field: Field, label: str) -> torch.Tensor:
    """Warn of weights that are no numbers; where they are to be packed they become zero."""
    if torch.isfinite(value.sum(dtype=torch.float32)) or bool(torch.isfinite(value).all()):
        return value
    packed = field.precision.is_packed
    warnings.warn(
        f"{label}: {field.name} holds NaN or infinite weights"
        f"{', stored as 0' if packed else ''}; the checkpoint is probably damaged.",
        UserWarning,
        stacklevel=2,
    )
    return value.nan_to_num(0.0, 0.0, 0.0) if packed else value
