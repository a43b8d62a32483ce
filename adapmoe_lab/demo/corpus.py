"""The training text: which files are read, and which documents are kept away from training."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from adapmoe_lab.evaluation.texts import read_lines, read_records
from adapmoe_lab.models.demo_architecture import END_OF_TEXT
from adapmoe_lab.records.arguments import one_string, strings

DEMO_DOMAINS = (
    "books_children_en",
    "books_fiction_en",
    "tinystories_en",
    "python_stdlib",
    "novels_de",
    "wikipedia_sentences_en",
    "gsm8k",
)
HELD_OUT_SHARE = 0.05
DEVELOPMENT_SHARE = 0.01
PIECE_CHARACTERS = 1_000
_FORMATS = (".jsonl.gz", ".txt.gz")
_LINE_WITHOUT_GAP = re.compile(r"(?<=\S)\n(?=\S)")


@dataclass(frozen=True)
class Document:
    """One text and the key by whose hash it is assigned to a split."""

    text: str
    key: str


@dataclass(frozen=True)
class SourceFile:
    """A file that was read: its path inside the text folder, size as stored, and hash."""

    path: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Domain:
    """The documents of one domain, in three disjoint splits.

    `training` is learnt, `development` chooses the recipe, `held_out` is only ever measured.
    """

    name: str
    training: tuple[str, ...]
    development: tuple[str, ...]
    held_out: tuple[str, ...]
    files: tuple[SourceFile, ...]

    @property
    def n_training_bytes(self) -> int:
        """UTF-8 bytes of the training split."""
        return sum(len(text.encode()) for text in self.training)


def read_corpus(folder: Path, names: str | Iterable[str] | None = None) -> tuple[Domain, ...]:
    """Read the domains of a text folder: its sub-folders, or the folder itself where it has none.

    `names` chooses among them. Left out, it is the demo's own seven if all are there, else every
    domain with training text. Files named test* are never opened.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no text folder at {folder}; name one with sub-folders of {_kinds()}."
        )
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    found = {name: path for name, path in found.items() if _training_files(path)}
    if not found and _training_files(folder):
        found = {folder.name: folder}
    if names is None:
        names = DEMO_DOMAINS if set(DEMO_DOMAINS) <= set(found) else tuple(found)
    names = strings("names", names)
    missing = [name for name in names if name not in found]
    if missing or not names:
        raise ValueError(
            f"{folder} has no training text ({_kinds()}) for {', '.join(missing) or 'any domain'}; "
            f"domains found: {', '.join(found) or 'none'}."
        )
    return tuple(_read_domain(found[name], name, folder) for name in names)


def fraction_of(key: str, purpose: str) -> float:
    """Return a number in [0, 1) that depends on the key and the purpose only."""
    digest = hashlib.sha256(f"{purpose}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _read_domain(path: Path, name: str, root: Path) -> Domain:
    training_files = _training_files(path)
    valid_files = [file for file in _text_files(path) if file.name.startswith("valid")]
    documents = _distinct(_read_files(training_files))
    if valid_files:
        held_out = _distinct(_read_files(valid_files))
        known = {document.key for document in held_out}
        documents = [document for document in documents if document.key not in known]
    else:
        documents, held_out = _take(documents, HELD_OUT_SHARE, "held out")
    training, development = _take(documents, DEVELOPMENT_SHARE, "development")
    return Domain(
        name=name,
        training=tuple(document.text for document in training),
        development=tuple(document.text for document in development),
        held_out=tuple(document.text for document in held_out),
        files=tuple(_describe(file, root) for file in (*training_files, *valid_files)),
    )


def _take(
    documents: list[Document], share: float, purpose: str
) -> tuple[list[Document], list[Document]]:
    """Split into (kept, taken) by the hash of the key; at least one is taken where two are there.

    Whole documents are taken: two parts of one book share its names and its phrases.
    """
    if len(documents) < 2:
        return documents, []
    fractions = [fraction_of(document.key, purpose) for document in documents]
    limit = max(share, min(fractions) * (1 + 1e-12))
    kept = [d for d, fraction in zip(documents, fractions, strict=True) if fraction >= limit]
    taken = [d for d, fraction in zip(documents, fractions, strict=True) if fraction < limit]
    return kept, taken


def _distinct(documents: Iterable[Document]) -> list[Document]:
    return list({document.key: document for document in documents}.values())


def _read_files(files: Iterable[Path]) -> Iterator[Document]:
    for file in files:
        if file.name.endswith(".jsonl.gz"):
            for line, record in read_records(file):
                yield _from_record(record, f"{file}, line {line}")
        else:
            yield from (Document(text, text) for text in _cut("\n".join(read_lines(file))))


def _from_record(record: Mapping[str, object], place: str) -> Document:
    if "question" in record and "answer" in record:
        question, answer = (
            one_string(f"{place}: its {name}", record[name]) for name in ("question", "answer")
        )
        return Document(f"{question}\n{answer}", key=question)
    if "text" in record:
        text = one_string(f"{place}: its text", record["text"])
        return Document(text, key=text)
    raise ValueError(f"{place}: has neither text nor question and answer: {sorted(record)}.")


def _cut(text: str) -> Iterator[str]:
    """Cut a plain text into documents.

    At the lines with the end-of-text marker, where there are any. Else at line ends that are no
    paragraph breaks (one newline, no blank line): between sentences given one a line, and between
    stories that follow one another. A document then has at least `PIECE_CHARACTERS` characters.
    """
    if END_OF_TEXT in text:
        yield from (part.strip() for part in text.split(END_OF_TEXT) if part.strip())
        return
    lines: list[str] = []
    for line in _LINE_WITHOUT_GAP.split(text.strip()):
        lines.append(line)
        if sum(map(len, lines)) >= PIECE_CHARACTERS:
            yield "\n".join(lines)
            lines = []
    if lines and any(lines):
        yield "\n".join(lines)


def _text_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(_FORMATS))


def _training_files(folder: Path) -> list[Path]:
    return [file for file in _text_files(folder) if not file.name.startswith(("valid", "test"))]


def _describe(file: Path, root: Path) -> SourceFile:
    content = file.read_bytes()
    return SourceFile(
        path=file.relative_to(root).as_posix(),
        n_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _kinds() -> str:
    return " and ".join(f"*{kind}" for kind in _FORMATS)
