"""The tokenizer that lies beside a model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from adapmoe_lab.models.checkpoint.configuration import one_line
from adapmoe_lab.models.checkpoint.hub import TOKENIZER_FILES
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError

SETTINGS = "tokenizer_config.json"
SOME_TEXT = "Once upon a time"


def read_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder; none of its code is run, nobody is asked to.

    Raises:
        CheckpointError: there is none, it comes with code of its own, or it does not work.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} holds no tokenizer (one of {', '.join(TOKENIZER_FILES)}); copy the files of "
            "the tokenizer that the model was trained with there, or download the model again."
        )
    if _has_code(folder):
        raise CheckpointError(
            f"The tokenizer in {folder} comes with code of its own (auto_map in {SETTINGS}), which "
            "is never run here. Where you trust it, convert it to a tokenizer.json and take "
            f"auto_map and tokenizer_class out of {SETTINGS}."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        n_tokens = len(tokenizer(SOME_TEXT)["input_ids"])
    except Exception as error:  # whatever a damaged file raises, by its kind
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be read: {one_line(error)} Copy the files of the "
            "tokenizer that the model was trained with there, or download the model again."
        ) from error
    if n_tokens == 0:
        raise CheckpointError(
            f"The tokenizer in {folder} makes no token of {SOME_TEXT!r}; its files are not those "
            "the model was trained with. Copy these there, or download the model again."
        )
    return tokenizer


def _has_code(folder: Path) -> bool:
    """Whether the tokenizer's class is one that the folder, or another repository, brings."""
    for name in (SETTINGS, "config.json", "processor_config.json"):
        try:
            settings = json.loads((folder / name).read_bytes())
        except (OSError, ValueError):  # absent, or reported as damaged by its reader
            continue
        mapped = settings.get("auto_map") if isinstance(settings, dict) else None
        if isinstance(mapped, list | tuple) or (
            isinstance(mapped, dict) and mapped.get("AutoTokenizer")
        ):
            return True
    return False
