"""Texts that ship with the project, and texts a user brings: what counts as how many texts."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapmoe_lab.assets import data_folder
from adapmoe_lab.records.arguments import described, one_string, strings

Texts = Iterable[str] | Mapping[str, str]
"""Several texts, or texts by their labels; a string alone is refused, see `as_texts`."""

TEXT_FIELDS = ("text", "prompt", "instruction")
CALIBRATION = Path("evaluation") / "calibration.jsonl"
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""What a file begins with that says how it is encoded; it is no text."""


def as_texts(texts: Texts, name: str = "texts") -> list[str]:
    """Return texts as a list; of a mapping the values are texts, the keys labels.

    Every function that takes texts takes them through here. A string alone is refused: it would be
    gone through letter by letter, and may be a text as well as the name of a file of them. So is a
    path, since what is in a file is read by `read_texts`.

    Raises:
        ValueError: it is one string or a path, or holds something else than strings; the error
            says where.
    """
    if isinstance(texts, str):
        raise ValueError(
            f"{name} must be several texts, got one string, {described(texts)}. Put a text in a "
            f"list, {name}=[text]; those of a file come from lab.read_texts(path)."
        )
    if isinstance(texts, os.PathLike):
        raise ValueError(
            f"{name} must be several texts, got a path, {described(texts)}. Those of a file come "
            f"from lab.read_texts(path): {name}=lab.read_texts({os.fspath(texts)!r})."
        )
    if isinstance(texts, Mapping):
        return [one_string(f"{name}[{label!r}]", text) for label, text in texts.items()]
    return strings(name, texts)


def as_labels(labels: str | Iterable[str] | None, texts: Texts, n_texts: int) -> list[str]:
    """Return one label per text, empty if there are none; a mapping's keys are labels.

    Raises:
        ValueError: they are not as many as the texts, or something else than strings.
    """
    if labels is None:
        return strings("labels", list(texts)) if isinstance(texts, Mapping) else []
    found = strings("labels", labels)
    if len(found) != n_texts:
        raise ValueError(f"{n_texts} texts need as many labels, got {len(found)}: {found[:8]}.")
    return found


def calibration_split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the texts to calibrate with and others to measure on: the first half and the second.

    Of an odd number the second half has one more; a single text serves for both.
    """
    half = len(texts) // 2 or 1
    return list(texts[:half]), list(texts[half:] or texts)


def calibration_texts() -> list[str]:
    """Return the shipped calibration texts, sampled from the demo model itself.

    Stories, fiction, Python, German, encyclopedia and arithmetic take turns, so that any part of
    the list holds every kind.
    """
    return read_texts(data_folder() / CALIBRATION)


def calibration_labels() -> list[str]:
    """Return the kind of each calibration text, in the order of `calibration_texts`."""
    return [record["label"] for _, record in read_records(data_folder() / CALIBRATION)]


def read_texts(path: str | Path) -> list[str]:
    """Return the texts of a file: one per line of .jsonl, one per paragraph of anything else.

    Either may be gzip-compressed; see `read_lines` for encodings and line ends. A .jsonl line is an
    object with a `text`, `prompt` or `instruction`, of which the first that is not empty counts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text, a line is not such an object, or the file holds no text.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No text file at {path}.")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if ".jsonl" in suffixes:
        texts = [_text_of(record, f"{path}, line {line}") for line, record in read_records(path)]
    elif ".json" in suffixes:
        raise ValueError(
            f"{path} is JSON, which is no text as it stands. Write one object with a `text` on "
            "each line and name the file .jsonl."
        )
    else:
        paragraphs = "\n".join(read_lines(path)).split("\n\n")
        texts = [paragraph.strip() for paragraph in paragraphs if paragraph.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text.")
    return texts


def read_records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the JSON objects of a .jsonl file, each with the number of its line from 1.

    Raises:
        ValueError: the file is not text, or a line is no JSON object.
    """
    records = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object, but it is no JSON: {error}."
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object, got {described(record)}."
            )
        records.append((number, record))
    return records


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, gzip-compressed or not, without their ends.

    It is UTF-8, or what a byte order mark at its beginning says; the mark is left out. Lines end as
    on Unix, Windows or old Macs.

    Raises:
        ValueError: the file is damaged, or is not text; the error says at which line.
    """
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"{path} is no complete gzip file ({error}). Compress it again, or name it "
                "without .gz if it is not compressed."
            ) from error
    return decoded(content, str(path)).removesuffix("\n").split("\n")


def decoded(content: bytes, source: str) -> str:
    """Return bytes as text whose lines all end in one newline; see `read_lines`.

    Raises:
        ValueError: they are no text; the error names the source and the line.
    """
    mark, encoding = next(
        ((mark, name) for mark, name in MARKS if content.startswith(mark)), (b"", "utf-8")
    )
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = _line_at(error.object[: error.start].decode(encoding, errors="replace"))
        raise ValueError(
            f"{source}, line {line}: not {encoding.upper()} ({error.reason}). Save it as UTF-8."
        ) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        raise ValueError(
            f"{source}, line {_line_at(text[: text.index(chr(0))])}: a zero byte. It is no text, "
            "or UTF-16 without a byte order mark. Save it as UTF-8."
        )
    return text


def _line_at(before: str) -> int:
    """Return the number, from 1, of the line that follows a beginning of a text."""
    return before.replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1


def _text_of(record: Mapping[str, Any], place: str) -> str:
    """Return the first text of a record that is not empty."""
    there = [field for field in TEXT_FIELDS if field in record]
    if not there:
        raise ValueError(
            f"{place}: expected a JSON object with one of {', '.join(TEXT_FIELDS)}, got one with "
            f"{', '.join(map(repr, record)) or 'nothing'}."
        )
    filled = [field for field in there if record[field] not in (None, "")]
    if not filled:
        raise ValueError(f"{place}: its {there[0]} is empty. Leave the line out.")
    return one_string(f"{place}: its {filled[0]}", record[filled[0]])
