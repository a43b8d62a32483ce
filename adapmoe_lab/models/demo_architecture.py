"""A demo model as transformers sees it: a small Mixture-of-Experts model and its tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

END_OF_TEXT = "<|endoftext|>"
DemoModel = PreTrainedModel
DemoTokenizer = PreTrainedTokenizerBase


@dataclass(frozen=True)
class DemoArchitecture:
    """The family and dimensions of a demo model; the defaults are those of the model that ships.

    `family` is a key of `FAMILIES`; `intermediate_size` is the width of one expert.
    """

    family: str = "mixtral"
    n_layers: int = 8
    n_experts: int = 8
    top_k: int = 2
    hidden_size: int = 256
    intermediate_size: int = 256
    n_heads: int = 8
    n_key_value_heads: int = 4
    vocabulary_size: int = 8192
    max_positions: int = 1024

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {self.family!r}.")
        if self.hidden_size % self.n_heads or (self.hidden_size // self.n_heads) % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not split into {self.n_heads} heads of an "
                f"even width; use a multiple of {2 * self.n_heads}."
            )
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"top_k must lie in 1..{self.n_experts}, got {self.top_k}.")

    def config(self, end_of_text_id: int) -> PreTrainedConfig:
        """Return the transformers configuration.

        It names no padding token: `nn.Embedding` would never train the row of one, and the
        end-of-text token, which serves as padding in the tokenizer, must be trained.
        """
        return AutoConfig.for_model(
            self.family,
            vocab_size=self.vocabulary_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_key_value_heads,
            num_experts_per_tok=self.top_k,
            max_position_embeddings=self.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            bos_token_id=end_of_text_id,
            eos_token_id=end_of_text_id,
            pad_token_id=None,
            **FAMILIES[self.family].own_fields(self),
        )


@dataclass(frozen=True)
class DemoFamily:
    """What a family's configuration has that the others' do not, and what the family is called."""

    title: str
    own_fields: Callable[[DemoArchitecture], dict[str, Any]]


def _mixtral_fields(shape: DemoArchitecture) -> dict[str, Any]:
    return {"num_local_experts": shape.n_experts}


def _qwen3_moe_fields(shape: DemoArchitecture) -> dict[str, Any]:
    return {
        "num_experts": shape.n_experts,
        "moe_intermediate_size": shape.intermediate_size,
        "norm_topk_prob": True,  # Qwen's own models renormalise, the configuration's default not
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "head_dim": shape.hidden_size // shape.n_heads,
    }


FAMILIES: Mapping[str, DemoFamily] = MappingProxyType(
    {
        "mixtral": DemoFamily("Mixtral", _mixtral_fields),
        "qwen3_moe": DemoFamily("Qwen3-MoE", _qwen3_moe_fields),
    }
)
"""The families a demo model can be of, by transformers' name."""


def build_model(architecture: DemoArchitecture, end_of_text_id: int) -> DemoModel:
    """Return an untrained model in float32, its weights drawn from torch's global generator."""
    config = architecture.config(end_of_text_id)
    model = AutoModelForCausalLM.from_config(config).float()
    model.set_experts_implementation("grouped_mm")
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text_id, eos_token_id=end_of_text_id, pad_token_id=end_of_text_id
    )
    return model


def wrap_tokenizer(tokenizer: Tokenizer, max_positions: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the `tokenizers` library in the form that `AutoTokenizer` loads."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )


def save_checkpoint(model: DemoModel, folder: Path, *, max_shard_size: str) -> None:
    """Write the weights in bfloat16 as safetensors shards; the model itself is left as it is."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, max_shard_size=max_shard_size)


def load_checkpoint(
    folder: Path | str, *, device: str | torch.device = "cpu", dtype: torch.dtype | str = "auto"
) -> tuple[DemoModel, PreTrainedTokenizerBase]:
    """Load a checkpoint with plain transformers, as any user would, in eval mode."""
    safely = {"trust_remote_code": False, "use_safetensors": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **safely)
    return model.to(device).eval(), tokenizer


def n_parameters(model: DemoModel) -> int:
    """Count the parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass
class RoutingTaps:
    """What the routers of one forward pass were given and returned, layer by layer.

    `inputs[l]` is [B, S, D], the input of layer l's MoE block; `logits[l]` is [B * S, E], its
    router's output. Each forward pass overwrites the one before.
    """

    inputs: dict[int, Tensor] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def routing_taps(model: DemoModel) -> Iterator[RoutingTaps]:
    """Listen to every router for as long as the context lasts."""
    taps = RoutingTaps()
    with ExitStack() as hooks:
        for index, layer in enumerate(model.model.layers):

            def keep_input(_: nn.Module, args: tuple[Tensor, ...], index: int = index) -> None:
                taps.inputs[index] = args[0]

            def keep_logits(
                _: nn.Module, __: tuple[Tensor, ...], output: tuple[Tensor, ...], index: int = index
            ) -> None:
                taps.logits[index] = output[0]

            hooks.callback(layer.mlp.register_forward_pre_hook(keep_input).remove)
            hooks.callback(layer.mlp.gate.register_forward_hook(keep_logits).remove)
        yield taps


@contextmanager
def residual_dropout(model: DemoModel, probability: float) -> Iterator[None]:
    """Drop elements of the embeddings and of every block's output while training.

    The families have no such dropout. Hooks add it from outside, so that the checkpoint stays one
    of its family; nothing is dropped in eval mode, and nothing stays behind on leaving.
    """
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"the dropout probability must lie in [0, 1), got {probability}.")

    def drop(module: nn.Module, _: object, output: Tensor | tuple) -> Tensor | tuple:
        if isinstance(output, tuple):  # attention returns (hidden states, attention weights)
            return (drop(module, None, output[0]), *output[1:])
        return functional.dropout(output, probability, training=module.training)

    with ExitStack() as hooks:
        if probability > 0:
            blocks = [
                block for layer in model.model.layers for block in (layer.self_attn, layer.mlp)
            ]
            for module in (model.model.embed_tokens, *blocks):
                hooks.callback(module.register_forward_hook(drop).remove)
        yield
