"""The sections of a config that name files of tensors beside it, written and read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapmoe_lab.records.files import RecordError, known_values
from adapmoe_lab.records.predictors import Predictors
from adapmoe_lab.records.prefetch import PrefetchTable
from adapmoe_lab.records.surrogates import KIND as SURROGATES
from adapmoe_lab.records.surrogates import Surrogates
from adapmoe_lab.records.tensors import TensorRecord

COMPENSATION = ("kind", "file", "sha256", "method", "ranks", "gain", "n_values")


def file_of(record: TensorRecord, name: str) -> str:
    """Return the name of the file beside `name`.json that holds a record."""
    return f"{name}.{record.sha256[:12]}.safetensors"


def surrogates_section(surrogates: Surrogates, name: str) -> dict[str, Any]:
    """Return the section that names the surrogates' file, with what a reader wants to know."""
    return {
        "kind": SURROGATES,
        "file": file_of(surrogates, name),
        "sha256": surrogates.sha256,
        "method": surrogates.method,
        "ranks": list(surrogates.ranks),
        "gain": surrogates.gain.tolist(),
        "n_values": surrogates.n_bytes(1),
    }


def prefetch_section(table: PrefetchTable, name: str) -> dict[str, Any]:
    """Return the section of a prefetch table, with the file of what was fitted for it."""
    fitted = table.fitted
    named = {"file": file_of(fitted, name), "sha256": fitted.sha256} if fitted else {}
    return {**table.to_json(), "fitted": named or None}


def read_surrogates(path: Path, section: Mapping[str, Any], source: str) -> Surrogates:
    """Read the surrogates that a config's section names, from beside the config."""
    section = known_values(section, source, COMPENSATION)
    if section["kind"] != SURROGATES:
        raise RecordError(
            f"{path} asks for compensation by {section['kind']!r}; expected {SURROGATES!r}."
        )
    return Surrogates.load(_beside(path, section["file"]), section["sha256"])


def read_prefetch(path: Path, section: Mapping[str, Any], source: str) -> PrefetchTable:
    """Read a prefetch table, and what was fitted for it from beside the config."""
    section = known_values(section, source, ("sources", "buffer_slots", "fitted"))
    named, fitted = section.pop("fitted"), None
    if named:
        named = known_values(named, f"{source} 'fitted',", ("file", "sha256"))
        fitted = Predictors.load(_beside(path, named["file"]), named["sha256"])
    return PrefetchTable.from_json(section, fitted, source)


def _beside(path: Path, name: str) -> Path:
    """Return the file of tensors that a config names, which must lie beside it."""
    file = path.with_name(Path(name).name)
    if file.name != name:
        raise RecordError(
            f"{path} names the tensors {name!r}; they must lie beside it, without a folder in "
            "their name."
        )
    if not file.exists():
        raise RecordError(
            f"{path} needs {file.name} beside it, which is not there. Copy both files together, "
            "or export the config again."
        )
    return file
