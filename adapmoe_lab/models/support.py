"""Which families are served exactly, which are served unchecked, which are refused, and why.

The one place where it is written down what a family does differently.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import transformers
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

EXTENSION_POINT = "use_experts_implementation"
"""The decorator by which a modelling file offers its experts to other implementations."""

FamilyClass = Literal["exact", "unverified", "refused"]


class UnsupportedModelError(ValueError):
    """The model has no experts this project can serve."""


class UnverifiedFamilyWarning(UserWarning):
    """The family offers its experts, but was never compared with the unmodified model."""


class Trait(StrEnum):
    """What a family does otherwise than Mixtral."""

    UNNORMALISED = "the weights of a token's experts do not sum to one"
    SELECTION_BIAS = "a bias takes part in choosing experts, not in weighing them"
    GROUPED = "experts are chosen from the best groups"
    UNSORTED = "a token's experts come in no order of weight"
    HASHED = "some layers choose experts by the token's id"
    OWN_INPUT = "the router reads something else than what the experts are given"
    BIASES = "experts have biases"
    INTERLEAVED = "gate and up projections alternate row by row"
    TRANSPOSED = "expert matrices are stored transposed"
    UNGATED = "experts have an up projection and no gate"
    OWN_GATE = "gate and up projections are joined in the family's own way"
    SHARED = "shared experts run for every token, and stay on the device"
    DENSE_LAYERS = "some layers have no routed experts"
    LOOPED = "some layers are run several times for each token; served, but not profiled"


class Scoring(StrEnum):
    """How a router turns logits into the scores by which experts are weighed."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SQRT_SOFTPLUS = "sqrtsoftplus"


@dataclass(frozen=True)
class Family:
    """What is particular to one family.

    Attributes:
        traits: what it does otherwise than Mixtral, in the form its usual checkpoints have.
        scoring: how its routers score experts.
        scoring_field: the field of the config that chooses the scoring instead, if there is one.
        note: anything a user should know besides.
    """

    traits: frozenset[Trait] = frozenset()
    scoring: Scoring = Scoring.SOFTMAX
    scoring_field: str | None = None
    note: str = ""

    def described(self) -> tuple[str, ...]:
        """Return the particulars as sentences, for documentation and for the doctor."""
        scores = () if self.scoring is Scoring.SOFTMAX else (f"scores are {self.scoring.value}",)
        traits = tuple(trait.value for trait in Trait if trait in self.traits)
        return (*scores, *traits, *((self.note,) if self.note else ()))


def _softmax(*traits: Trait, note: str = "") -> Family:
    return Family(frozenset(traits), note=note)


def _sigmoid(*traits: Trait, field: str | None = None, note: str = "") -> Family:
    return Family(frozenset(traits), Scoring.SIGMOID, field, note)


T = Trait
_DEEPSEEK = (T.GROUPED, T.SELECTION_BIAS, T.UNSORTED)
"""Selection as DeepSeek-V3 introduced it (arXiv 2412.19437, section 2.1.2)."""
_SHARED_DEEPSEEK = (*_DEEPSEEK, T.SHARED, T.DENSE_LAYERS)
_INKLING2 = (T.SELECTION_BIAS, T.UNSORTED, T.UNNORMALISED, T.OWN_GATE)

VERIFIED: Mapping[str, Family] = MappingProxyType(
    {
        "afmoe": _sigmoid(T.SELECTION_BIAS, T.SHARED, T.DENSE_LAYERS),
        "aria_text": _softmax(T.TRANSPOSED, T.SHARED),
        "axk1": _sigmoid(*_SHARED_DEEPSEEK, T.UNNORMALISED),
        "axk2": _sigmoid(*_SHARED_DEEPSEEK, T.UNNORMALISED),
        "bailing_hybrid": _sigmoid(*_SHARED_DEEPSEEK, T.UNNORMALISED),
        "beam": _sigmoid(T.GROUPED, T.SELECTION_BIAS, T.OWN_GATE, T.DENSE_LAYERS),
        "cohere2_moe": _sigmoid(T.SHARED, field="expert_selection_fn"),
        "deepseek_v2": _softmax(T.UNSORTED, T.SHARED, T.DENSE_LAYERS, T.UNNORMALISED, T.GROUPED),
        "deepseek_v3": _sigmoid(*_SHARED_DEEPSEEK, T.UNNORMALISED),
        "deepseek_v32": _sigmoid(*_SHARED_DEEPSEEK, T.UNNORMALISED),
        "deepseek_v4": Family(
            frozenset(
                {T.SELECTION_BIAS, T.UNSORTED, T.HASHED, T.SHARED, T.UNNORMALISED, T.OWN_GATE}
            ),
            Scoring.SQRT_SOFTPLUS,
            "scoring_func",
        ),
        "dots1": _sigmoid(*_SHARED_DEEPSEEK, T.UNNORMALISED),
        "dots3_note": _sigmoid(*_SHARED_DEEPSEEK),
        "dots3_note_text": _sigmoid(*_SHARED_DEEPSEEK),
        "ernie4_5_moe": _softmax(T.SELECTION_BIAS, T.SHARED, T.DENSE_LAYERS),
        "exaone_moe": _sigmoid(*_SHARED_DEEPSEEK, T.UNNORMALISED),
        "flex_olmo": _softmax(T.UNNORMALISED),
        "flint": _sigmoid(T.SHARED, T.DENSE_LAYERS),
        "gemma4": _softmax(T.OWN_INPUT),
        "gemma4_text": _softmax(T.OWN_INPUT),
        "glm4_moe": _sigmoid(*_SHARED_DEEPSEEK),
        "glm4_moe_lite": _sigmoid(*_SHARED_DEEPSEEK, T.UNNORMALISED),
        "glm_moe_dsa": _sigmoid(*_SHARED_DEEPSEEK, T.UNNORMALISED),
        "gpt_oss": _softmax(T.BIASES, T.INTERLEAVED, T.TRANSPOSED, T.OWN_GATE),
        "granitemoe": _softmax(),
        "granitemoe_swa": _softmax(),
        "granitemoehybrid": _softmax(T.SHARED),
        "granitemoeshared": _softmax(T.SHARED),
        "hunyuan_v1_moe": _softmax(T.SHARED),
        "hy_v3": _sigmoid(
            T.SELECTION_BIAS, T.UNSORTED, T.SHARED, T.DENSE_LAYERS, T.UNNORMALISED
        ),
        "hy_v4": _sigmoid(*_SHARED_DEEPSEEK, T.UNNORMALISED, T.OWN_GATE),
        "inkling2_loop_text": _sigmoid(*_INKLING2, T.LOOPED, field="scoring_func"),
        "inkling2_text": _sigmoid(*_INKLING2, field="scoring_func"),
        "inkling_text": _sigmoid(
            T.SELECTION_BIAS, T.UNSORTED, T.SHARED, T.UNNORMALISED, T.DENSE_LAYERS,
            note="the router scores the shared experts too, in its last rows",
        ),
        "jamba": _softmax(T.UNNORMALISED, T.DENSE_LAYERS),
        "kimi_linear": _sigmoid(*_SHARED_DEEPSEEK, T.UNNORMALISED),
        "kolibri1": _sigmoid(T.SELECTION_BIAS, T.SHARED, T.UNNORMALISED),
        "laguna": _sigmoid(T.SELECTION_BIAS, T.SHARED, T.DENSE_LAYERS),
        "lara_mini": _softmax(T.SHARED),
        "lfm2_moe": _sigmoid(T.SELECTION_BIAS, T.DENSE_LAYERS),
        "mellum": _softmax(),
        "mimo_v2_flash": _sigmoid(*_DEEPSEEK, T.DENSE_LAYERS),
        "minimax": _softmax(),
        "minimax_m2": _sigmoid(T.SELECTION_BIAS, T.UNSORTED),
        "minimax_m3_vl_text": _sigmoid(T.SELECTION_BIAS, T.UNSORTED, T.SHARED, T.OWN_GATE),
        "mixtral": _softmax(),
        "nemotron_h": _sigmoid(*_SHARED_DEEPSEEK, T.UNGATED),
        "olmoe": _softmax(T.UNNORMALISED),
        "phimoe": _softmax(
            T.UNNORMALISED,
            note="each expert of a token is weighed by a softmax of its own over the nearby ones",
        ),
        "qwen2_moe": _softmax(T.SHARED, T.UNNORMALISED),
        "qwen3_5_moe": _softmax(T.SHARED),
        "qwen3_5_moe_text": _softmax(T.SHARED),
        "qwen3_moe": _softmax(T.DENSE_LAYERS),
        "qwen3_next": _softmax(T.SHARED),
        "qwen4_exp": _softmax(T.SHARED),
        "qwen4_exp_text": _softmax(T.SHARED),
        "solar_open": _sigmoid(*_DEEPSEEK, T.SHARED),
        "zaya": _softmax(
            T.OWN_INPUT, T.SELECTION_BIAS, T.UNNORMALISED,
            note="its routers pass a state from layer to layer and may choose no expert",
        ),
    }
)  # fmt: skip
"""Families whose logits and greedy continuations equal the unmodified model's in the tests."""

_NO_EXTENSION_POINT = (
    "it does not use transformers' experts interface, so its experts cannot be served"
)

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "dbrx": _NO_EXTENSION_POINT,
        "doge": f"its experts are rows of embeddings, not matrices, and {_NO_EXTENSION_POINT}",
        "jetmoe": _NO_EXTENSION_POINT,
        "llama4": _NO_EXTENSION_POINT,
        "llama4_text": _NO_EXTENSION_POINT,
        "longcat_flash": _NO_EXTENSION_POINT,
    }
)
"""Families with routed experts that cannot be served, each with the reason."""


def find_family(model_type: str) -> Family:
    """Return what is known of a family; nothing particular where it was never compared."""
    return VERIFIED.get(model_type, Family())


def causal_families() -> Mapping[str, str]:
    """Return the causal language models of the installed transformers that offer their experts.

    Maps model types to transformers' model folders.
    """
    folders = {name: model_type_to_module_name(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return {name: folder for name, folder in folders.items() if _offers_experts(folder)}


@cache
def _offers_experts(folder: str) -> bool:
    """Search a model folder's modelling files as text; nothing of them is imported."""
    models = Path(transformers.__file__).parent / "models"
    files = (models / folder).glob("modeling_*.py")
    return any(f"@{EXTENSION_POINT}" in file.read_text(encoding="utf-8") for file in files)


def family_class(model_type: str) -> FamilyClass:
    """Return whether a family is served exactly, served unchecked, or refused.

    Depends on the installed transformers: the list of families on the interface grows.
    """
    if model_type in REFUSED:
        return "refused"
    if model_type not in CONFIG_MAPPING_NAMES:  # registered by whoever wrote its code
        return "unverified"
    is_causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not (is_causal and _offers_experts(model_type_to_module_name(model_type))):
        return "refused"
    return "exact" if model_type in VERIFIED else "unverified"


def check_family(model_type: str) -> None:
    """Raise for a family that cannot be served, warn for one that was never compared.

    Args:
        model_type: the family's name, as `config.model_type` has it.

    Raises:
        UnsupportedModelError: the family is refused, with the reason.
    """
    match family_class(model_type):
        case "refused":
            raise UnsupportedModelError(refusal(model_type))
        case "unverified":
            warnings.warn(
                f"{model_type} offers its experts through transformers' experts interface, but "
                "was never compared with the unmodified model here. Compare its logits with "
                "those of AutoModelForCausalLM before you rely on it.",
                UnverifiedFamilyWarning,
                stacklevel=3,
            )
        case "exact":
            pass


def refusal(model_type: str) -> str:
    """Return why a family is refused, and what is served instead."""
    if model_type in REFUSED:
        reason = f"{model_type} is refused: {REFUSED[model_type]}."
    elif model_type in VERIFIED and not _offers_experts(model_type_to_module_name(model_type)):
        reason = (
            f"{model_type} is refused: the experts interface of transformers "
            f"{transformers.__version__} does not reach it; install a newer transformers."
        )
    elif model_type in CONFIG_MAPPING_NAMES.keys() - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys():
        reason = f"{model_type} is refused: transformers has no causal language model of this type."
    else:
        reason = (
            f"This {model_type} model has no Mixture-of-Experts layer; give a model with routed "
            "experts."
        )
    return f"{reason} {supported()}"


def supported() -> str:
    """Return the sentence that names the families compared with the unmodified model."""
    return (
        f"Supported: {', '.join(VERIFIED)}; other families that use transformers' experts "
        "interface load with a warning."
    )
