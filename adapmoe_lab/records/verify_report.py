"""What a verification found, check by check, with everything it was found under."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from adapmoe_lab.records.files import (
    IDENTIFYING,
    RecordError,
    check_version,
    fields_of,
    known_values,
    save_json,
)

KIND = "verify-report"
SCHEMA_VERSION = 1

Verdict = Literal["passed", "failed", "measured", "not known"]
"""`measured` is what has no bound to keep to, `not known` what could not be found out here."""


@dataclass(frozen=True)
class Check:
    """One line of a verification.

    Attributes:
        name: what was checked.
        verdict: what came of it.
        found: the numbers in words, or the reason why there are none.
        bound: what they had to keep to, in words; empty if there is no bound.
        values: all numbers and raw samples, as plain JSON values.
    """

    name: str
    verdict: Verdict
    found: str
    bound: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Freeze the values and refuse an unknown verdict."""
        if self.verdict not in get_args(Verdict):
            raise RecordError(
                f"The verdict of check {self.name!r} is {self.verdict!r}; expected one of "
                f"{', '.join(get_args(Verdict))}."
            )
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that `from_json` reads back."""
        held = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**held, "values": dict(self.values)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str = "The check") -> Check:
        """Build a check from what `to_json` returned.

        Raises:
            RecordError: a value is unknown, missing or wrong; the text names `source`.
        """
        return cls(**fields_of(cls, values, source))


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found of a model on a machine.

    Attributes:
        checks: exactness, executor, speed, prediction and loss, in this order.
        conditions: when, with which versions, on which machine, of which model and config.
    """

    checks: tuple[Check, ...]
    conditions: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Freeze the conditions."""
        object.__setattr__(self, "checks", tuple(self.checks))
        object.__setattr__(self, "conditions", MappingProxyType(dict(self.conditions)))

    def __getitem__(self, name: str) -> Check:
        """Return the check of a name; KeyError if there is none."""
        by_name = {check.name: check for check in self.checks}
        if name not in by_name:
            raise KeyError(f"no check {name!r}; there are {', '.join(by_name)}")
        return by_name[name]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.verdict == "failed")

    def table(self) -> str:
        """Return the checks as a Markdown table."""
        rows = [
            (check.name, check.verdict, check.found, check.bound or "none") for check in self.checks
        ]
        return "\n".join(
            "| " + " | ".join(cells) + " |"
            for cells in (("check", "verdict", "found", "bound"), ("---",) * 4, *rows)
        )

    def to_json(self) -> dict[str, Any]:
        """Return the whole document that `save` writes."""
        return {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "conditions": dict(self.conditions),
            "checks": [check.to_json() for check in self.checks],
        }

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON, whole or not at all, and return its path."""
        path = Path(path)
        save_json(path, self.to_json(), allow_nan=False)
        return path

    @classmethod
    def load(cls, path: str | Path) -> VerifyReport:
        """Read a saved report.

        Raises:
            FileNotFoundError: there is no such file.
            RecordError: it is cut short, another kind of file, or of an unknown version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"No {KIND} at {path}; give a file that report.save wrote.")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordError(
                f"{path} is not a complete JSON file ({error}). Verify again."
            ) from error
        names = (*IDENTIFYING, "conditions", "checks")
        if isinstance(document, dict):
            check_version(document, KIND, SCHEMA_VERSION, path)
        document = known_values(document, str(path), names)
        try:
            checks = [
                Check.from_json(values, f"{path}, check {number},")
                for number, values in enumerate(document["checks"])
            ]
            return cls(tuple(checks), document["conditions"])
        except (TypeError, ValueError) as error:
            if isinstance(error, RecordError):
                raise
            raise RecordError(f"{path} has a part of the wrong form: {error!r}.") from error
