"""Held-out text for the benchmarks: the `valid` files of a folder laid out as data/README.md says.

Nothing here was trained on, and nothing that is evaluated on is calibrated with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adapmoe_lab.evaluation.texts import read_texts

DOMAINS = ("books_children_en", "books_fiction_en", "python_stdlib", "novels_de")
TEXTS_PER_DOMAIN = 24
TEXT_CHARACTERS = 900

PIECE_TOKENS = 512
PIECE_CHARACTERS = 2100
"""Long enough for `PIECE_TOKENS` tokens of the demo's tokenizer in nearly every piece."""


def documents(folder: Path, domain: str) -> list[str]:
    """Return the held-out documents of one domain."""
    return read_texts(folder / domain / "valid.jsonl.gz")


def held_out_texts(folder: Path) -> list[str]:
    """Return evenly spaced pieces of every domain's held-out documents."""
    pieces = []
    for domain in DOMAINS:
        whole = "\n\n".join(documents(folder, domain))
        pieces += spaced_pieces(whole, TEXTS_PER_DOMAIN, TEXT_CHARACTERS)
    return pieces


def calibration_and_evaluation(
    folder: Path, calibration_tokens: int, evaluation_tokens: int, split: str = "documents"
) -> tuple[list[str], list[str]]:
    """Return texts to calibrate with and others to evaluate on, evenly spaced, domains by turns.

    Every second one of a domain, counted from its first, is for calibration: of its `documents`,
    so that the halves differ in books and authors, or of its `pieces`, so that they are alike.
    Each text is to be cut to `PIECE_TOKENS` tokens.

    Raises:
        ValueError: the folder has too little text.
    """
    halves = []
    for half, n_tokens in enumerate((calibration_tokens, evaluation_tokens)):
        n_pieces = -(-n_tokens // (PIECE_TOKENS * len(DOMAINS)))
        by_domain = [_half_of(folder, domain, half, split, n_pieces) for domain in DOMAINS]
        halves.append([piece for turn in zip(*by_domain, strict=True) for piece in turn])
    return halves[0], halves[1]


def _half_of(folder: Path, domain: str, half: int, split: str, n_pieces: int) -> Sequence[str]:
    """Return pieces of one half of a domain's held-out text."""
    of_documents = documents(folder, domain)
    if split == "documents":
        whole = "\n\n".join(of_documents[half::2])
        n_possible = len(whole) // PIECE_CHARACTERS
        pieces = spaced_pieces(whole, n_pieces, PIECE_CHARACTERS)
    else:
        whole = "\n\n".join(of_documents)
        every = spaced_pieces(whole, len(whole) // PIECE_CHARACTERS, PIECE_CHARACTERS)[half::2]
        n_possible = len(every)
        pieces = [every[n_possible * number // n_pieces] for number in range(n_pieces)]
    if n_pieces > n_possible:
        raise ValueError(
            f"{n_pieces} pieces of {PIECE_CHARACTERS} characters are asked of {domain}, half of "
            f"whose held-out text has {n_possible}."
        )
    return pieces


def spaced_pieces(whole: str, n_pieces: int, n_characters: int) -> Sequence[str]:
    """Return evenly spaced pieces of a text."""
    starts = np.linspace(0, len(whole), n_pieces, endpoint=False).astype(int)
    return [whole[start : start + n_characters] for start in starts]
