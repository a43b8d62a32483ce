"""What a model is by its configuration alone: layers, shapes and bytes, without any weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from adapmoe_lab.models.checkpoint.configuration import one_line
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.models.families import MoELayer, find_moe_layers
from adapmoe_lab.models.support import Trait, UnsupportedModelError, find_family
from adapmoe_lab.records import PRECISIONS, ExpertFormat, MoESpec, PrecisionPlan

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

TOP_K_NAMES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "moe_router_topk")
"""What families call K."""


@dataclass(frozen=True, eq=False)
class MetaModel:
    """A model that was looked at; no weight has been read.

    Attributes:
        name: what the user called it.
        hf: the transformers model on the meta device: shapes and names, no memory.
        layers: its layers with routed experts.
        dtype: name of the precision to compute in.
        quantisation: how its weights come quantised, such as `mxfp4`, or None.
    """

    name: str
    hf: PreTrainedModel
    layers: list[MoELayer]
    dtype: str
    quantisation: str | None = None

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        return self.hf.config

    @property
    def stored_as(self) -> str:
        """The precision that keeps the experts as they come."""
        return "mxfp4" if self.quantisation == "mxfp4" else self.dtype

    @property
    def other_bytes(self) -> int:
        """Bytes of all weights that are not experts, in the precision to compute in."""
        experts = {
            f"{layer.path}.{name}" for layer in self.layers for name in layer.parameter_names
        }
        tensors = [
            *(p for name, p in self.hf.named_parameters() if name not in experts),
            *self.hf.buffers(),
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def expert_format(self, layer: int, precision: str) -> ExpertFormat:
        """Return how a layer's experts are laid out in a precision."""
        experts = self.layers[layer].experts
        names = self.layers[layer].parameter_names
        shapes = {name: tuple(getattr(experts, name).shape[1:]) for name in names}
        plain = precision if precision in DTYPES else self.dtype
        return ExpertFormat.of(shapes, precision, plain, bool(experts.is_transposed))


def meta_model_of(
    name: str, config: PreTrainedConfig, dtype: str, quantisation: str | None = None
) -> MetaModel:
    """Return the meta model of a model with the given configuration.

    Raises:
        CheckpointError: transformers cannot build the model.
        UnsupportedModelError: the model has no experts that can be served.
    """
    try:
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(
                config, dtype=DTYPES[dtype], trust_remote_code=False
            ).eval()
    except Exception as error:  # whatever a field that fits no model raises, by its class
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot build the {config.model_type} model "
            f"that the config.json of {name} describes: {one_line(error)} Correct config.json, or "
            "download the model again."
        ) from error
    return MetaModel(name, hf, find_moe_layers(hf), dtype, quantisation)


def describe(
    model: MetaModel,
    formats: Sequence[Sequence[ExpertFormat]],
    routed: torch.Tensor | None = None,
    revision: str = "",
    partial_revision: str = "",
) -> MoESpec:
    """Return the spec of a model whose experts are stored in the given formats [L][E].

    Args:
        model: the model's meta model.
        formats: the layout of every expert.
        routed: one layer's router weights [T, K] as the experts receive them, which tell K and
            whether the router normalises, whatever the family calls them; None to go by the
            configuration.
        revision: identity of the weights, where they were read.
        partial_revision: the identity that versions up to 0.1 gave them.
    """
    layers = model.layers
    expert_bytes = {
        name: max(model.expert_format(n, name).n_bytes for n in range(len(layers)))
        for name in PRECISIONS
    }
    if routed is None:
        top_k = configured_top_k(model.config)
        normalises = Trait.UNNORMALISED not in find_family(model.config.model_type).traits
    else:
        top_k, sums = routed.shape[1], routed.float().sum(dim=-1)
        normalises = bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-2))
    return MoESpec(
        model_id=model.name,
        revision=revision,
        partial_revision=partial_revision,
        family=model.config.model_type,
        n_layers=len(layers),
        n_experts=layers[0].n_experts,
        top_k=top_k,
        hidden_size=layers[0].input_size,
        expert_bytes=expert_bytes,
        precision=PrecisionPlan.of(formats),
        layer_paths=tuple(layer.path for layer in layers),
        normalises_router=normalises,
    )


def configured_top_k(config: PreTrainedConfig) -> int:
    """Return how many experts a token gets, by the names that families give it.

    Where a family gives the number layer by layer, it must be the same in all of them.

    Raises:
        UnsupportedModelError: the configuration has none of the names, or layers differ.
    """
    text = config.get_text_config()
    for name in TOP_K_NAMES:
        value = getattr(text, name, None)
        in_layers = set(value) if isinstance(value, list | tuple) else {value}
        if len(in_layers) > 1:
            raise UnsupportedModelError(
                f"The configuration of this {config.model_type} model gives a token different "
                f"numbers of experts by layer ({name}={list(value)}); only models with the same "
                "number in every layer can be served."
            )
        if in_layers and type(next(iter(in_layers))) is int:
            return next(iter(in_layers))
    raise UnsupportedModelError(
        f"The configuration of this {config.model_type} model does not say how many experts a "
        f"token gets; expected one of {', '.join(TOP_K_NAMES)}. Please report this family."
    )
