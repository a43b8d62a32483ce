"""A tuned configuration: everything needed to run a model the way it was tuned."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from adapmoe_lab.records.cache_plan import CachePlan
from adapmoe_lab.records.config_tensors import (
    file_of,
    prefetch_section,
    read_prefetch,
    read_surrogates,
    surrogates_section,
)
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
SECTIONS = (
    "gating",
    "compensation",
    "plan",
    "eviction",
    "prefetch",
    "precision",
    "hardware",
    "evidence",
)
NOT_RUN = ("model", "evidence")
"""Fields that are in no section's fingerprint: the weights, which `model` identifies by itself, and
what is known about a config, which changes nothing of what it does."""
MODEL = (
    "id", "fingerprint", "partial_fingerprint", "family", "n_layers", "n_experts", "top_k",
)  # fmt: skip
EVICTION_POLICIES = (
    "lru",
    "lfu",
    "lfu_aged",
    "router_average",
    "least_stale",
    "hobbit",
    "static",
)
MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class TunedConfig:
    """How to run one model: which experts to skip, which to keep, and the evidence for it.

    Attributes:
        model: identity of the model, as `model_identity` gives it.
        gating: cuts per layer, or None to skip nothing.
        compensation: what stands in for skipped experts, or None for nothing.
        plan: slots per layer, or None for those the model was loaded with.
        eviction: name of the eviction policy.
        prefetch: what is fetched ahead, or None for nothing.
        precision: how every expert is stored, or None for as it was saved.
        hardware: the machine the numbers were predicted for.
        evidence: what was predicted and measured, with the conditions.
    """

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
        """Freeze the mappings and check that all parts describe the same model."""
        object.__setattr__(self, "model", MappingProxyType(dict(self.model)))
        object.__setattr__(self, "evidence", MappingProxyType(dict(self.evidence)))
        n_layers, top_k = self.model["n_layers"], self.model["top_k"]
        if self.gating and (self.gating.n_layers, self.gating.top_k) != (n_layers, top_k):
            raise RecordError(
                f"The gating table is for {self.gating.n_layers} layers and top-"
                f"{self.gating.top_k}; the model has {n_layers} layers and top-{top_k}."
            )
        if self.compensation is not None:
            self._check_compensation(self.compensation)
        if self.prefetch is not None:
            self._check_prefetch(self.prefetch)
        if self.plan and len(self.plan.slots) != n_layers:
            raise RecordError(
                f"The cache plan has {len(self.plan.slots)} layers; the model has {n_layers}."
            )
        shape = self.precision.shape if self.precision is not None else None
        if shape is not None and shape != (n_layers, self.model["n_experts"]):
            raise RecordError(
                f"The precision plan is for {shape[0]} layers of {shape[1]} experts; the model has "
                f"{n_layers} layers of {self.model['n_experts']}."
            )
        if self.eviction not in EVICTION_POLICIES:
            known = ", ".join(EVICTION_POLICIES)
            raise RecordError(f"Eviction policy {self.eviction!r} is unknown; expected: {known}.")
        has_pins = self.plan is not None and self.plan.pinned is not None
        if has_pins != (self.eviction == "static"):
            raise RecordError(
                "Eviction 'static' and a cache plan with pinned experts go together: eviction is "
                f"{self.eviction!r}, and the plan pins {'some' if has_pins else 'none'}."
            )
        pinned = self.plan.pinned if self.plan is not None and self.plan.pinned else ()
        n_experts = self.model["n_experts"]
        if any(not 0 <= expert < n_experts for layer in pinned for expert in layer):
            raise RecordError(f"Pinned experts must lie in 0..{n_experts - 1}, got {pinned}.")

    def _check_compensation(self, surrogates: Surrogates) -> None:
        """Refuse surrogates of another model, and two rules for the kept weights."""
        shape = surrogates.n_layers, surrogates.n_experts
        wanted = self.model["n_layers"], self.model["n_experts"]
        if shape != wanted or not self._is_of_model(surrogates.model_fingerprint):
            raise RecordError(
                f"The surrogates were fitted to a model of {shape[0]} layers x {shape[1]} experts, "
                f"fingerprint {surrogates.model_fingerprint}; the config is for "
                f"{self.model['id']!r}, {wanted[0]} layers x {wanted[1]} experts, fingerprint "
                f"{self.model['fingerprint']}. Fit surrogates to this model."
            )
        if self.gating and self.gating.renormalise:
            raise RecordError(
                "The gating table renormalises the kept weights and the surrogates scale them by "
                "a gain of their own; 1 renormalises. Use GatingTable(..., renormalise=False)."
            )

    def _check_prefetch(self, table: PrefetchTable) -> None:
        """Refuse a prefetch table of another model."""
        n_layers = self.model["n_layers"]
        if table.n_layers != n_layers:
            raise RecordError(
                f"The prefetch table is for {table.n_layers} layers; the model has {n_layers}."
            )
        if table.fitted is not None and not self._is_of_model(table.fitted.model_fingerprint):
            raise RecordError(
                f"The predictors were fitted to a model of fingerprint "
                f"{table.fitted.model_fingerprint}; the config is for {self.model['id']!r}, "
                f"fingerprint {self.model['fingerprint']}. Fit predictors to this model."
            )

    def _is_of_model(self, fingerprint: str) -> bool:
        """Whether a part was made for this model, as far as it knows; running it tells the rest."""
        return fingerprint in (self.model["fingerprint"], self.model.get("partial_fingerprint"))

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """What is saved beside the JSON, by the section that names it."""
        fitted = self.prefetch.fitted if self.prefetch is not None else None
        held = {"compensation": self.compensation, "prefetch": fitted}
        return {section: record for section, record in held.items() if record is not None}

    @property
    def stand_in(self) -> str:
        """Identify what takes a skipped expert's place, as a `SensitivityProfile` names it."""
        if self.compensation is not None:
            return self.compensation.fingerprint()
        return RENORMALISED if self.gating is not None and self.gating.renormalise else NOTHING

    def section_fingerprints(self) -> dict[str, str | None]:
        """Identify what every section makes a model do; None where a section is off.

        All fields but `NOT_RUN` are sections. The machine's times decide what is fetched ahead and
        nothing else, so that `hardware` is None without prefetch.
        """
        sections = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NOT_RUN}
        if self.prefetch is None:
            sections["hardware"] = None
        return {
            name: section if section is None or isinstance(section, str) else section.fingerprint()
            for name, section in sections.items()
        }

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
        return {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "model": dict(self.model),
            "gating": self.gating.to_json() if self.gating else None,
            "compensation": surrogates_section(self.compensation, name)
            if self.compensation
            else None,
            "plan": self.plan.to_json() if self.plan else None,
            "eviction": {"policy": self.eviction},
            "prefetch": prefetch_section(self.prefetch, name) if self.prefetch else None,
            "precision": self.precision.to_json() if self.precision else None,
            "hardware": self.hardware.to_json() if self.hardware else None,
            "evidence": dict(self.evidence) or None,
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
        document = known_values(document, str(path), (*IDENTIFYING, "model", *SECTIONS))
        sources = {name: f"{path}, section {name!r}," for name in document}

        def read(name: str, read_section: Callable[[Any, str], Any]) -> Any:
            section = document[name]
            return None if section is None else read_section(section, sources[name])

        try:
            model = known_values(
                document["model"], sources["model"], MODEL, later=("partial_fingerprint",)
            )
            shape = model["n_layers"], model["n_experts"]
            return cls(
                model=model,
                gating=read("gating", GatingTable.from_json),
                compensation=read("compensation", partial(read_surrogates, path)),
                plan=read("plan", CachePlan.from_json),
                eviction=read("eviction", partial(_only_value, "policy")) or "lru",
                prefetch=read("prefetch", partial(read_prefetch, path)),
                precision=read("precision", partial(PrecisionPlan.from_json, shape)),
                hardware=read("hardware", HardwareProfile.from_json),
                evidence=document["evidence"] or {},
            )
        except RecordError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise RecordError(f"{path} has a section of the wrong form: {error!r}.") from error


def _only_value(name: str, section: Any, source: str) -> Any:
    """Return the value of a section that holds one."""
    return known_values(section, source, (name,))[name]
