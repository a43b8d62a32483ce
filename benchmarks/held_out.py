"""Held-out text for the benchmarks: the `valid` files of a folder laid out as data/README.md says.

Nothing here was trained on, and nothing that is evaluated on is calibrated with.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

DOMAINS = ("books_children_en", "books_fiction_en", "python_stdlib", "novels_de")
TEXTS_PER_DOMAIN = 24
TEXT_CHARACTERS = 900

PIECE_TOKENS = 512
PIECE_CHARACTERS = 2100
"""Long enough for `PIECE_TOKENS` tokens of the demo's tokenizer in nearly every piece."""


def documents(folder: Path, domain: str) -> list[str]:
    """Return the held-out documents of one domain."""
    with gzip.open(folder / domain / "valid.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def held_out_texts(folder: Path) -> list[str]:
    """Return evenly spaced pieces of every domain's held-out documents."""
    pieces = []
    for domain in DOMAINS:
        whole = "\n\n".join(documents(folder, domain))
        pieces += spaced_pieces(whole, TEXTS_PER_DOMAIN, TEXT_CHARACTERS)
    return pieces


def calibration_and_evaluation(
    folder: Path, calibration_tokens: int, evaluation_tokens: int
) -> tuple[list[str], list[str]]:
    """Return texts to calibrate with and others to evaluate on, never of one document.

    Every second document of a domain, counted from its first, is for calibration. Each piece
    is to be cut to `PIECE_TOKENS` tokens; domains take turns.

    Raises:
        ValueError: the folder has too little text.
    """
    halves = []
    for half, n_tokens in enumerate((calibration_tokens, evaluation_tokens)):
        n_pieces = -(-n_tokens // (PIECE_TOKENS * len(DOMAINS)))
        by_domain = []
        for domain in DOMAINS:
            whole = "\n\n".join(documents(folder, domain)[half::2])
            if len(whole) < n_pieces * PIECE_CHARACTERS:
                raise ValueError(
                    f"{n_tokens} tokens need {n_pieces} pieces of {PIECE_CHARACTERS} characters "
                    f"of {domain}, half of whose held-out documents have {len(whole)} characters."
                )
            by_domain.append(spaced_pieces(whole, n_pieces, PIECE_CHARACTERS))
        halves.append([piece for turn in zip(*by_domain, strict=True) for piece in turn])
    return halves[0], halves[1]


def spaced_pieces(whole: str, n_pieces: int, n_characters: int) -> Sequence[str]:
    """Return evenly spaced pieces of a text."""
    starts = np.linspace(0, len(whole), n_pieces, endpoint=False).astype(int)
    return [whole[start : start + n_characters] for start in starts]
