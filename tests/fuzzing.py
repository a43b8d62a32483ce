"""What the tests of drawn inputs share: a plain model to compare with, and what counts as words."""

from __future__ import annotations

import json
import linecache
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCABULARY_SIZE
from transformers import AutoModelForCausalLM, PreTrainedModel

import adapmoe_lab
from adapmoe_lab.engine.loading import load

PACKAGE = str(Path(adapmoe_lab.__file__).parent)
IDS = torch.randint(1, VOCABULARY_SIZE, (2, 12), generator=torch.Generator().manual_seed(3))
TOLERANCE = 2e-4
"""Of logits, or of the largest where weights of any size were drawn."""
SHORTEST_TEXT = 25


def refused_in_words(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or None where it is refused in this project's own words.

    Any other exception, such as one that another library raised or one of a kind that says only
    what broke, fails the test.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except (ValueError, TypeError, OSError, MemoryError) as refusal:
            error = refusal
    last, text = traceback.extract_tb(error.__traceback__)[-1], str(error)
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    is_ours = last.filename.startswith(PACKAGE) and line.startswith("raise ")
    assert is_ours, f"{type(error).__name__} of {last.filename}:{last.lineno}: {text}"
    assert len(text) >= SHORTEST_TEXT, f"{type(error).__name__} says too little: {text!r}"
    return None


def plain_model(folder: Path) -> PreTrainedModel | None:
    """Return the unmodified model in float32; None where transformers does not load all of it."""
    try:
        hf, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    except Exception:  # whatever it raises, it does not load the model
        return None
    # weights drawn at random are nobody's model
    return None if report["missing_keys"] or report["mismatched_keys"] else hf.eval()


def check_equal_or_refused(folder: Path) -> bool:
    """Fail unless a folder is served as transformers runs it, or refused; return which."""
    quiet = {"device": "cpu", "link": "none", "announce": lambda text: None}
    model = refused_in_words(lambda: load(folder, dtype="float32", **quiet))
    if model is None:
        return False
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        plain = plain_model(folder)
        assert plain is not None, "served, though transformers does not load it"
        try:
            expected = plain(IDS).logits
        except Exception:  # a model that cannot run: what comes is the same with and without us
            return False
        found = model.hf(IDS).logits
    largest = max(1.0, float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * largest, equal_nan=True)
    return True


def change_config(folder: Path, fields: Mapping[str, Any]) -> None:
    """Overwrite fields of a folder's configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
