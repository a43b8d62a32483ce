"""A tuned configuration: everything needed to run a model the way it was tuned."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from adapmoe_lab.records.cache_plan import CachePlan
from adapmoe_lab.records.config.section import ConfigSection, SavedSection, file_of
from adapmoe_lab.records.config.sections import SECTIONS
from adapmoe_lab.records.files import (
    IDENTIFYING,
    RecordError,
    check_version,
    digest,
    json_bytes,
    known_values,
    save_json,
)
from adapmoe_lab.records.gating_table import GatingTable
from adapmoe_lab.records.hardware import HardwareProfile
from adapmoe_lab.records.precision_plan import PrecisionPlan
from adapmoe_lab.records.prefetch import PrefetchTable
from adapmoe_lab.records.sensitivity import NOTHING, RENORMALISED
from adapmoe_lab.records.spec import MoESpec
from adapmoe_lab.records.surrogates import Surrogates
from adapmoe_lab.records.tensors import TensorRecord

KIND = "tuned-config"
SCHEMA_VERSION = 1
MODEL = (
    "id", "fingerprint", "partial_fingerprint", "family", "n_layers", "n_experts", "top_k",
)  # fmt: skip
MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class TunedConfig:
    """How to run one model: which experts to skip, which to keep, and the evidence for it.

    Every field but the model is what its section holds, see `ConfigSection`.

    Attributes:
        model: identity of the model, as `model_identity` gives it.
        gating: cuts per layer, or None to skip nothing.
        compensation: the surrogates of skipped experts, or None for nothing in their place.
        plan: slots per layer, or None for those the model was loaded with.
        eviction: name of the eviction policy.
        prefetch: what is prefetched, or None for nothing.
        precision: how every expert is stored, or None for as it was saved.
        hardware: the machine the numbers were predicted for.
        evidence: what was predicted and measured, with the conditions.
    """

    SECTIONS: ClassVar[tuple[ConfigSection[Any], ...]] = SECTIONS

    model: Mapping[str, Any]
    gating: GatingTable | None = None
    compensation: Surrogates | None = None
    plan: CachePlan | None = None
    eviction: str = "lru"
    prefetch: PrefetchTable | None = None
    precision: PrecisionPlan | None = None
    hardware: HardwareProfile | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Freeze the mappings and check that all sections describe the same model."""
        object.__setattr__(self, "model", MappingProxyType(dict(self.model)))
        for section in self.SECTIONS:
            value = getattr(self, section.name)
            if value is not None or not section.can_be_off:
                object.__setattr__(self, section.name, section.checked(value, self))

    def _held(self) -> Iterator[tuple[ConfigSection[Any], Any]]:
        """Yield the sections that are on, with their values."""
        for section in self.SECTIONS:
            value = getattr(self, section.name)
            if value is not None:
                yield section, value

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """What is saved beside the JSON, by the section that names it."""
        records = {section.name: section.tensors(value) for section, value in self._held()}
        return {name: record for name, record in records.items() if record is not None}

    @property
    def stand_in(self) -> str:
        """Identify what takes a skipped expert's place, as a `SensitivityProfile` names it."""
        if self.compensation is not None:
            return self.compensation.fingerprint()
        return RENORMALISED if self.gating is not None and self.gating.renormalise else NOTHING

    def section_fingerprints(self) -> dict[str, str | None]:
        """Identify what every section makes a model do; None where it makes it do nothing."""
        found = {}
        for section in self.SECTIONS:
            value = getattr(self, section.name)
            if section.decides and not (section.is_later and value is None):
                found[section.name] = None if value is None else section.fingerprint(value, self)
        return found

    def fingerprint(self) -> str:
        """Identify the model and everything that decides how it is run."""
        sections = json.dumps(self.section_fingerprints(), sort_keys=True)
        return digest(self.model["fingerprint"], sections)

    @classmethod
    def untuned(cls, spec: MoESpec) -> TunedConfig:
        """Return the config that runs a model as it is: nothing skipped, every expert kept."""
        return cls(model=cls.model_identity(spec))

    @staticmethod
    def model_identity(spec: MoESpec) -> dict[str, Any]:
        """Return what a config remembers of the model it was tuned for."""
        return {
            "id": spec.model_id,
            "fingerprint": spec.fingerprint(),
            "partial_fingerprint": spec.partial_fingerprint(),
            "family": spec.family,
            "n_layers": spec.n_layers,
            "n_experts": spec.n_experts,
            "top_k": spec.top_k,
        }

    def check_model(self, spec: MoESpec) -> None:
        """Raise RecordError unless the config was tuned for this model's weights."""
        spec.check_made_for(
            self.model["fingerprint"],
            f"This config was tuned for {self.model['id']!r} ({self.model['family']}, "
            f"{self.model['n_layers']} layers x {self.model['n_experts']} experts)",
            "Load the model it was tuned for, or tune this one.",
        )

    def with_evidence(self, **entries: Any) -> TunedConfig:
        """Return the config with entries added to its evidence."""
        return replace(self, evidence={**self.evidence, **entries})

    def to_json(self, name: str = "tuned") -> dict[str, Any]:
        """Return the whole version-1 document; sections that are off are null.

        Tensors are named as `save` writes them beside `name`.json.
        """
        held = {section.name: section.to_json(value, name) for section, value in self._held()}
        return {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "model": dict(self.model),
            **{section.name: held.get(section.name) for section in self.SECTIONS},
        }

    def save(self, path: str | Path) -> Path:
        """Write the config as JSON, whole or not at all, and return its path.

        Surrogates and fitted predictors go into `NAME.<sha256[:12]>.safetensors` beside it,
        before the JSON that names them.
        """
        path = Path(path)
        document = self.to_json(path.stem)
        for record in self.tensors.values():
            record.save(path.with_name(file_of(record, path.stem)))
        save_json(path, document, allow_nan=False)
        return path

    def as_one_file(self, name: str = "tuned") -> bytes:
        """Return what `save` writes for `name`.json as one: the JSON, or a zip of all files."""
        document = self.to_json(name)
        content = json_bytes(document, allow_nan=False)
        if not self.tensors:
            return content
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(f"{name}.json", content)
            for record in self.tensors.values():
                archive.writestr(file_of(record, name), record.to_bytes())
        return buffer.getvalue()

    @classmethod
    def load(cls, path: str | Path) -> TunedConfig:
        """Read a saved config.

        Raises:
            FileNotFoundError: there is no such file.
            RecordError: cut short, not a config, of an unknown version, with wrong values, or
                with tensors beside it that are missing or not those that were saved.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"No tuned config at {path}; give a file that config.save wrote."
            )
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordError(
                f"{path} is not a complete JSON file ({error}); it may have been cut short. "
                "Export the config again."
            ) from error
        if not isinstance(document, dict):
            raise RecordError(f"{path} holds a JSON {type(document).__name__}, not a tuned config.")
        while document.get("schema_version") in MIGRATIONS:
            document = MIGRATIONS[document["schema_version"]](document)
        check_version(document, KIND, SCHEMA_VERSION, path)
        return cls._from_document(document, path)

    @classmethod
    def _from_document(cls, document: Mapping[str, Any], path: Path) -> TunedConfig:
        names = (*IDENTIFYING, "model", *(section.name for section in cls.SECTIONS))
        later = [section.name for section in cls.SECTIONS if section.is_later]
        document = known_values(document, str(path), names, later)
        try:
            source = f"{path}, section 'model',"
            model = known_values(document["model"], source, MODEL, later=("partial_fingerprint",))
            held = {}
            for section in cls.SECTIONS:
                saved = document.get(section.name)
                if saved is not None:
                    source = f"{path}, section {section.name!r},"
                    held[section.name] = section.from_json(SavedSection(saved, source, path, model))
            return cls(model, **held)
        except RecordError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise RecordError(f"{path} has a section of the wrong form: {error!r}.") from error
