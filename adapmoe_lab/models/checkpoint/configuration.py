"""A model's configuration: read without running its code, and held against what its files say."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from adapmoe_lab.models.checkpoint.number_formats import FP8, MXFP4_PARTS, TORCH_DTYPES
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.models.checkpoint.shards import CONFIG_NAME, ShardIndex
from adapmoe_lab.models.support import UnsupportedModelError, supported
from adapmoe_lab.records.files import digest

DEQUANTISED = ("mxfp4", "fp8")
"""Quantised checkpoints that can be read here."""


WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path", "name_or_path", "transformers_version", "transformers_weights",
        "architectures", "auto_map", "dtype", "torch_dtype", "attn_implementation",
        "_attn_implementation", "experts_implementation", "_experts_implementation", "use_cache",
        "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "initializer_range",
        "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
        "router_aux_loss_coef", "attention_dropout", "hidden_dropout",
    }
)  # fmt: skip
"""Fields of a configuration that change nothing of what given weights compute."""


class ConfigDisagreementWarning(UserWarning):
    """A configuration says of the weights what their files do not hold."""


@dataclass(frozen=True)
class QuantisationClaim:
    """What a configuration says of how its weights are quantised.

    Attributes:
        method: transformers' name of the method, such as `fp8`.
        fp8_blocks: rows and columns that share a scale in float8, if it says so.
    """

    method: str
    fp8_blocks: tuple[int, int] | None = None


def read_config(folder: Path) -> tuple[PreTrainedConfig, QuantisationClaim | None]:
    """Read a model's configuration, and what it says of quantised weights.

    Quantised weights are dequantised here as they are read, so the configuration returned no
    longer asks transformers to do so.

    Raises:
        CheckpointError: transformers cannot make a configuration of the file.
        UnsupportedModelError: transformers does not know the architecture, or the configuration
            names code to fetch.
        ValueError: the checkpoint is quantised in a way that cannot be read here.
    """
    config = _configuration(folder)
    _refuse_hub_code(folder, config)
    claim = None
    for part in (config.get_text_config(), config):
        quantisation = getattr(part, "quantization_config", None)
        if quantisation is not None:
            claim = _claim(folder, quantisation)
            del part.quantization_config
    return config, claim


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Read the settings of generation that lie beside a model; None if there are none.

    Raises:
        CheckpointError: the file cannot be understood.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a field of the wrong form raises, by its class
        raise CheckpointError(
            f"{path} cannot be understood by transformers {transformers.__version__}: "
            f"{one_line(error)} Correct it, take it away, or download the model again."
        ) from error


def settings_digest(folder: Path) -> str:
    """Identify what a configuration makes of given weights: all its fields but those of no effect.

    Taken from the file as it stands, so that it is the same under every transformers.
    """
    settings = json.loads((folder / CONFIG_NAME).read_bytes())
    return digest(json.dumps(_with_effect(settings), sort_keys=True))


def _with_effect(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _with_effect(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if value is not None and name not in WITHOUT_EFFECT
    }


def quantisation_found(index: ShardIndex) -> str | None:
    """Return how weights are quantised by the headers of their files; None if they are plain."""
    blocks, scales = MXFP4_PARTS
    for name in index.names:
        if name.endswith(blocks) and name.removesuffix(blocks) + scales in index:
            return "mxfp4"
    return "fp8" if any(index.entry(name).dtype == FP8 for name in index.names) else None


def check_against_files(
    claim: QuantisationClaim | None, dtype: str | None, index: ShardIndex
) -> None:
    """Warn of what a configuration says otherwise than the headers of the files, which hold.

    Args:
        claim: what it says of quantised weights.
        dtype: the precision it names, None if that does not matter.
        index: the files.
    """
    found, claimed = quantisation_found(index), claim.method if claim is not None else None
    path, kinds = index.folder / CONFIG_NAME, _kinds(index)
    if claimed != found:
        warnings.warn(
            f"{path} says that the weights are {_in_words(claimed)}, their files that they are "
            f"{_in_words(found)} ({', '.join(kinds)}); they are read as the files have them. "
            "Correct its quantization_config.",
            ConfigDisagreementWarning,
            stacklevel=4,
        )
    stored = TORCH_DTYPES.get(kinds[0]) if kinds else None
    if found is None and dtype is not None and stored is not None and stored.is_floating_point:
        stored_as = str(stored).removeprefix("torch.")
        if stored_as != dtype:
            warnings.warn(
                f"{path} says dtype {dtype!r}, most weights are stored as {stored_as}; they are "
                f"computed with in {dtype}, as transformers does. Give dtype={stored_as!r} to "
                "compute in what is stored.",
                ConfigDisagreementWarning,
                stacklevel=4,
            )


def _configuration(folder: Path) -> PreTrainedConfig:
    path = folder / CONFIG_NAME
    try:
        settings, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
        if not isinstance(settings, dict):
            raise TypeError(f"it holds a JSON {type(settings).__name__}, not an object")
        _check_architecture(folder, settings)
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a field of the wrong form raises, by its class
        raise CheckpointError(
            f"{path} cannot be understood by transformers {transformers.__version__}: "
            f"{one_line(error)} Correct it, or download the model again."
        ) from error


def _refuse_hub_code(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse a configuration that names attention code on the hub, which transformers would run.

    Such a name has a slash, as repositories have; those of transformers' own code have none.
    """
    asked = config._attn_implementation
    if isinstance(asked, str) and "/" in asked:
        raise UnsupportedModelError(
            f"{folder / CONFIG_NAME} names code of the hub to compute attention with ({asked}), "
            "which is never run here. Take attn_implementation out of it."
        )
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            _refuse_hub_code(folder, part)


def one_line(error: Exception) -> str:
    """Return another library's error as one sentence."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}."


def _check_architecture(folder: Path, settings: dict[str, Any]) -> None:
    model_type = settings.get("model_type")
    if model_type in CONFIG_MAPPING:
        return
    if "auto_map" in settings:
        raise UnsupportedModelError(
            f"{folder} is a {model_type} model that comes with code of its own, which is never "
            f"run here. Give a model that transformers itself knows. {supported()}"
        )
    raise UnsupportedModelError(
        f"{folder} is a {model_type} model, which transformers {transformers.__version__} does "
        f"not know; a newer one may. {supported()}"
    )


def _claim(folder: Path, quantisation: Any) -> QuantisationClaim:
    settings = (
        quantisation if isinstance(quantisation, dict) else getattr(quantisation, "__dict__", {})
    )
    method = settings.get("quant_method")
    if method is None:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} has the quantization_config {quantisation!r}; expected an "
            "object that names its quant_method. Correct it, or take it out if the weights are "
            "plain."
        )
    method = str(getattr(method, "value", method))
    if method not in DEQUANTISED:
        raise ValueError(
            f"{folder} is quantised with {method}, which cannot be served expert by expert; give "
            "the original checkpoint and quantise it while loading with expert_dtype='int4'. "
            f"Quantised checkpoints that load as they are: {', '.join(DEQUANTISED)}."
        )
    blocks = settings.get("weight_block_size")
    return QuantisationClaim(method, tuple(map(int, blocks)) if blocks else None)  # pyright: ignore[reportArgumentType]


def _kinds(index: ShardIndex) -> list[str]:
    """Return the element types of a checkpoint, the one with most bytes first."""
    n_bytes: Counter[str] = Counter()
    for name in index.names:
        n_bytes[index.entry(name).dtype] += index.entry(name).n_bytes
    return [kind for kind, _ in n_bytes.most_common()]


def _in_words(method: str | None) -> str:
    return "plain" if method is None else f"quantised with {method}"
