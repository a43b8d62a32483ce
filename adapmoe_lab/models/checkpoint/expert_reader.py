"""One expert at a time out of a checkpoint of any family, through transformers' own conversions."""

from __future__ import annotations

import copy
import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from types import MappingProxyType

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from adapmoe_lab.models.checkpoint.mapped_files import MappedFiles
from adapmoe_lab.models.checkpoint.number_formats import (
    FP8,
    FP8_SCALE,
    MXFP4_PARTS,
    TORCH_DTYPES,
    ExpertTensors,
    Mxfp4Matrix,
    dequantise_fp8,
)
from adapmoe_lab.models.checkpoint.open_files import OpenFiles
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError, TensorEntry
from adapmoe_lab.models.checkpoint.shards import ShardIndex
from adapmoe_lab.models.checkpoint.source_tensor import SourceTensor
from adapmoe_lab.models.families import MoELayer

SAMPLE_BYTES = 512
"""Bytes of each expert that tell one checkpoint's experts from another's."""

EXPERT_NUMBER = re.compile(r"\.experts\.(\d+)\.")


class ExpertReader:
    """Reads any expert of a checkpoint, whenever it is asked for.

    Which tensors an expert is made of, and how they are joined, is worked out once from
    transformers' conversion rules; a read then touches only that expert's bytes. Files are opened
    as they are needed, and closed by `close` or with the reader. Safe to use from several threads.
    """

    def __init__(
        self,
        index: ShardIndex,
        meta_model: PreTrainedModel,
        layers: list[MoELayer],
        fp8_blocks: tuple[int, int] | None = None,
    ) -> None:
        """Plan the reads.

        Args:
            index: where the tensors lie.
            meta_model: the model on the meta device.
            layers: its MoE layers.
            fp8_blocks: rows and columns that share a scale in float8, where that is known.

        Raises:
            CheckpointError: experts are missing, or stored in a way that cannot be cut apart.
        """
        self.index = index
        self._outline = meta_model
        self._layers = layers
        self._fp8_blocks = fp8_blocks
        self._files = OpenFiles(index.folder)
        self.close = self._files.close
        mapping = get_model_conversion_mapping(meta_model)
        self._renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        self._sources = self._plan()
        self._check_complete()

    def read(
        self,
        layer: int,
        expert: int,
        dtype: torch.dtype,
        into: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> ExpertTensors:
        """Return an expert's tensors under the names and in the shapes of the experts module.

        Args:
            layer: number of the MoE layer.
            expert: number of the expert.
            dtype: precision of floating-point tensors; microscaling matrices stay packed.
            into: contiguous tensors of that precision, by name, that are filled and returned
                where the files hold a tensor's bytes as they are wanted, or its pieces in order.
        """
        read: dict[str, torch.Tensor | Mxfp4Matrix] = {}
        packed: dict[str, torch.Tensor] = {}
        for target, sources in self._sources[layer][expert].items():
            if target in into and self._are_its_bytes(sources, dtype, into[target].shape):
                read[target] = self._filled(into[target], sources, expert)
            elif sources[0].pattern is not None:
                read[target] = self._converted(layer, expert, target, sources, dtype)
            elif target.endswith(MXFP4_PARTS):
                packed[target] = self._raw(sources[0], expert).view(torch.uint8)
            else:
                read[target] = self._read(sources[0], expert, dtype)
        for target in self._layers[layer].parameter_names:
            if target not in read:
                blocks, scales = (packed[target + part] for part in MXFP4_PARTS)
                read[target] = Mxfp4Matrix(blocks, scales)
        for name, value in read.items():
            self._check_shape(layer, name, value)
        return {name: read[name] for name in self._layers[layer].parameter_names}

    def _check_shape(self, layer: int, name: str, value: torch.Tensor | Mxfp4Matrix) -> None:
        experts = self._layers[layer].experts
        wanted = tuple(getattr(experts, name).shape[1:])
        shape = tuple(value.shape)
        if isinstance(value, Mxfp4Matrix):
            n_rows, n_columns = wanted[::-1] if experts.is_transposed else wanted
            wanted = (n_rows, -(-n_columns // 32) * 32)
        if shape != wanted:
            raise CheckpointError(
                f"{self.index.folder} holds {name} of {self._layers[layer].path} as {shape}, its "
                f"configuration makes it {wanted}; config.json and the files are of different "
                "models."
            )

    def sample_digest(self) -> str:
        """Identify the experts by some bytes from the middle of each."""
        sha = hashlib.sha256()
        for layer in self._sources:
            for expert, found in enumerate(layer):
                source = next(iter(found.values()))[0]
                middle = source.n_bytes // 2
                n_bytes = min(SAMPLE_BYTES, source.n_bytes - middle)
                sample = torch.empty(n_bytes, dtype=torch.uint8)
                self._files.read_into(source.entry, source.offset(expert) + middle, sample)
                sha.update(sample.numpy().tobytes())
        return sha.hexdigest()

    def other_tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return every tensor of the checkpoint that is no part of an expert.

        float8 ones are dequantised to `dtype`; the others are mapped from their files as they are.
        """
        of_experts = {
            source.entry.name
            for layer in self._sources
            for expert in layer
            for sources in expert.values()
            for source in sources
        }
        others = {
            name: self.index.entry(name)
            for name in self.index.names
            if name not in of_experts and not name.endswith(FP8_SCALE)
        }
        mapped = MappedFiles(self.index.folder)
        return {
            name: self._read(SourceTensor(entry, None, is_fused=False), 0, dtype)
            if entry.dtype == FP8
            else mapped.tensor(entry)
            for name, entry in others.items()
        }

    def _plan(self) -> list[list[dict[str, list[SourceTensor]]]]:
        """Return per layer and expert what each parameter is made of."""
        wanted = {
            f"{layer.path}.{name}{suffix}": (number, name + suffix)
            for number, layer in enumerate(self._layers)
            for name in layer.parameter_names
            for suffix in ("", *MXFP4_PARTS)
        }
        state = self._outline.state_dict()
        plan = [
            [defaultdict[str, list[SourceTensor]](list) for _ in range(layer.n_experts)]
            for layer in self._layers
        ]
        for key in self.index.names:
            new, pattern = rename_source_key(
                key, self._renamings, self._converters, self._outline.base_model_prefix, state
            )
            if new not in wanted:
                continue
            number, target = wanted[new]
            entry = self.index.entry(key)
            match = EXPERT_NUMBER.search(key)
            if match is not None:
                if int(match[1]) >= self._layers[number].n_experts:
                    raise CheckpointError(
                        f"{key} is of more experts than the {self._layers[number].n_experts} that "
                        f"the configuration in {self.index.folder} gives a layer; config.json and "
                        "the files are of different models."
                    )
                plan[number][int(match[1])][target].append(self._source(entry, pattern, False))
                continue
            n_experts = self._layers[number].n_experts
            if not entry.shape or entry.shape[0] != n_experts:
                raise CheckpointError(
                    f"{key} has the shape {entry.shape}, which cannot be cut into the "
                    f"{n_experts} experts of {self._layers[number].path}."
                )
            fused = self._source(entry, pattern, True)
            for expert in range(n_experts):
                plan[number][expert][target].append(fused)
        return [[dict(expert) for expert in layer] for layer in plan]

    def _check_complete(self) -> None:
        """Every expert must be made of as many tensors as the others."""
        for layer, experts in zip(self._layers, self._sources, strict=True):
            for name in layer.parameter_names:
                targets = [name] if name in experts[0] else [name + part for part in MXFP4_PARTS]
                most = max(len(found.get(targets[0], ())) for found in experts)
                for number, found in enumerate(experts):
                    n_found = min(len(found.get(target, ())) for target in targets)
                    if n_found == 0 or n_found < most:
                        raise CheckpointError(
                            f"{self.index.folder} has no {'whole ' if n_found else ''}{name} for "
                            f"expert {number} of {layer.path}; download it again, or give one "
                            "that was saved as this architecture."
                        )

    def _converted(
        self, layer: int, expert: int, target: str, sources: list[SourceTensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """Run transformers' converter on the tensors of one expert, as if there were no other."""
        assert sources[0].pattern is not None  # noqa: S101 only converted tensors come here
        converter = copy.deepcopy(self._rule(sources[0].pattern))
        full_name = f"{self._layers[layer].path}.{target}"
        for source in sources:
            tensor = self._read(source, expert, dtype)
            tensor = tensor[None] if source.is_fused else tensor
            converter.add_tensor(full_name, source.entry.name, source.pattern, lambda t=tensor: t)  # pyright: ignore
        made = converter.convert(full_name, model=self._outline, config=self._outline.config)
        value = made[full_name]
        return (value[0] if isinstance(value, list) else value)[0]

    def _are_its_bytes(
        self, sources: list[SourceTensor], dtype: torch.dtype, shape: torch.Size
    ) -> bool:
        """Whether a tensor's bytes are those of its sources, one after the other."""
        if any(TORCH_DTYPES.get(source.entry.dtype) != dtype for source in sources):
            return False
        shapes = [source.shape for source in sources]
        n_rows = sum(rows for rows, *_ in shapes)
        if {(n_rows, *others) for _, *others in shapes} != {tuple(shape)}:
            return False
        pattern = sources[0].pattern
        if pattern is None:
            return True
        rule = self._rule(pattern)
        stacks = [MergeModulelist(dim=0)] * (not sources[0].is_fused)
        joins = [Concatenate(dim=1)] * (len(rule.source_patterns) > 1)
        wanted = [(type(operation), operation.dim) for operation in (*stacks, *joins)]
        found = [
            (type(operation), getattr(operation, "dim", None)) for operation in rule.operations
        ]
        return found == wanted and [s.pattern for s in sources] == rule.source_patterns

    def _filled(self, out: torch.Tensor, sources: list[SourceTensor], expert: int) -> torch.Tensor:
        flat, start = out.view(-1).view(torch.uint8), 0
        for source in sources:
            end = start + source.n_bytes
            self._files.read_into(source.entry, source.offset(expert), flat[start:end])
            start = end
        return out

    def _rule(self, pattern: str) -> WeightConverter:
        return next(rule for rule in self._converters if pattern in rule.source_patterns)

    def _read(self, source: SourceTensor, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor, or one expert's part of a fused one, in the precision asked for."""
        name, tensor = source.entry.name, self._raw(source, expert)
        if source.entry.dtype != FP8:
            return tensor.to(dtype)
        try:
            scales = self._raw(self._scales_of(source), expert)
            scaled = dequantise_fp8(tensor, scales, self._fp8_blocks)
        except ValueError as error:
            raise CheckpointError(
                f"{name} in {self.index.folder} cannot be dequantised: {error}."
            ) from error
        return scaled.to(dtype)

    def _scales_of(self, source: SourceTensor) -> SourceTensor:
        """Return what scales a float8 tensor: experts' own scales, or one for all of them.

        Raises:
            CheckpointError: there is nothing to scale it by, or scales that fit no expert.
        """
        name = source.entry.name
        if name + FP8_SCALE not in self.index:
            raise CheckpointError(
                f"{name} in {self.index.folder} is stored as float8, and there is no "
                f"{name + FP8_SCALE} to scale it by; give the checkpoint in another format."
            )
        scales = self.index.entry(name + FP8_SCALE)
        is_shared = prod(scales.shape) == 1
        if source.is_fused and not is_shared and scales.shape[:1] != source.entry.shape[:1]:
            raise CheckpointError(
                f"{scales.name} in {self.index.folder} has the shape {scales.shape}; expected one "
                f"number, or scales for each of the {source.entry.shape[0]} experts."
            )
        return replace(source, entry=scales, is_fused=source.is_fused and not is_shared)

    def _source(self, entry: TensorEntry, pattern: str | None, is_fused: bool) -> SourceTensor:
        """Return a tensor that experts are made of, refused if its header does not tell its values.

        Raises:
            CheckpointError: it is quantised in a way that cannot be read.
        """
        source = SourceTensor(entry, pattern, is_fused)
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is not None and entry.name.endswith(MXFP4_PARTS) and dtype.itemsize == 1:
            return source
        if dtype is None or not dtype.is_floating_point:
            raise CheckpointError(
                f"{entry.name} in {self.index.folder} is stored as {entry.dtype}, and the weights "
                "of experts are read from plain, float8 and mxfp4 numbers: it is quantised in "
                "another way. Give the original checkpoint and quantise it while loading with "
                "expert_dtype='int8'."
            )
        if entry.dtype == FP8:
            self._scales_of(source)
        return source

    def _raw(self, source: SourceTensor, expert: int) -> torch.Tensor:
        """Return what an expert takes of a tensor, as the file has it."""
        entry = source.entry
        buffer = torch.empty(source.n_bytes, dtype=torch.uint8)
        self._files.read_into(entry, source.offset(expert), buffer)
        return buffer.view(TORCH_DTYPES[entry.dtype]).view(source.shape)
