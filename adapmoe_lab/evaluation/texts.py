"""Texts that ship with the project, and texts a user brings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from adapmoe_lab.assets import data_folder

TEXT_FIELDS = ("text", "prompt", "instruction")


CALIBRATION = Path("evaluation") / "calibration.jsonl"


def calibration_texts() -> list[str]:
    """Return the shipped calibration texts, sampled from the demo model itself.

    Stories, fiction, Python, German, encyclopedia and arithmetic take turns, so that any part of
    the list holds every kind.
    """
    return read_texts(data_folder() / CALIBRATION)


def calibration_labels() -> list[str]:
    """Return the kind of each calibration text, in the order of `calibration_texts`."""
    return [json.loads(line)["label"] for line in read_lines(data_folder() / CALIBRATION)]


def read_texts(path: str | Path) -> list[str]:
    """Return the texts of a file: one per line of .jsonl, one per paragraph of anything else.

    Either may be gzip-compressed. A .jsonl line is an object with a `text` field.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not such an object, or the file holds no text.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No text file at {path}.")
    lines = read_lines(path)
    if ".jsonl" in path.suffixes:
        texts = [_text_of(line, path, number) for number, line in enumerate(lines, 1) if line]
    else:
        paragraphs = "\n".join(lines).split("\n\n")
        texts = [paragraph.strip() for paragraph in paragraphs if paragraph.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text.")
    return texts


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, gzip-compressed or not."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return content.decode("utf-8").removesuffix("\n").split("\n")


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
        return next(record[field] for field in TEXT_FIELDS if record.get(field))
    except (ValueError, StopIteration, AttributeError) as error:
        fields = ", ".join(TEXT_FIELDS)
        raise ValueError(
            f"{path}, line {number}: expected a JSON object with one of {fields}."
        ) from error
