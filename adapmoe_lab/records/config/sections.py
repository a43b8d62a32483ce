"""The sections of a config, in the order in which they stand in its file."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from adapmoe_lab.records.cache_plan import CachePlan
from adapmoe_lab.records.config.section import (
    ConfigSection,
    SavedSection,
    file_beside,
    file_of,
    is_of_model,
)
from adapmoe_lab.records.files import RecordError, known_values
from adapmoe_lab.records.gating_table import GatingTable
from adapmoe_lab.records.hardware import HardwareProfile
from adapmoe_lab.records.precision_plan import PrecisionPlan
from adapmoe_lab.records.predictors import Predictors
from adapmoe_lab.records.prefetch import PrefetchTable
from adapmoe_lab.records.surrogates import KIND as SURROGATES
from adapmoe_lab.records.surrogates import Surrogates

if TYPE_CHECKING:
    from adapmoe_lab.records.config.tuned_config import TunedConfig


class GatingSection(ConfigSection[GatingTable]):
    """Which experts are skipped."""

    name = "gating"

    def checked(self, value: GatingTable, config: TunedConfig) -> GatingTable:
        """Refuse a table for another shape of model."""
        n_layers, top_k = config.model["n_layers"], config.model["top_k"]
        if (value.n_layers, value.top_k) != (n_layers, top_k):
            raise RecordError(
                f"The gating table is for {value.n_layers} layers and top-{value.top_k}; the model "
                f"has {n_layers} layers and top-{top_k}."
            )
        return value

    def from_json(self, saved: SavedSection) -> GatingTable:
        """Return the saved table."""
        return GatingTable.from_json(saved.values, saved.source)


class CompensationSection(ConfigSection[Surrogates]):
    """What takes the place of skipped experts, in a file of tensors."""

    name = "compensation"

    def checked(self, value: Surrogates, config: TunedConfig) -> Surrogates:
        """Refuse surrogates of another model, and two rules for the kept weights."""
        shape, model = (value.n_layers, value.n_experts), config.model
        wanted = model["n_layers"], model["n_experts"]
        if shape != wanted or not is_of_model(value.model_fingerprint, config):
            raise RecordError(
                f"The surrogates were fitted to a model of {shape[0]} layers x {shape[1]} experts, "
                f"fingerprint {value.model_fingerprint}; the config is for {model['id']!r}, "
                f"{wanted[0]} layers x {wanted[1]} experts, fingerprint {model['fingerprint']}. "
                "Fit surrogates to this model."
            )
        if config.gating is not None and config.gating.renormalise:
            raise RecordError(
                "The gating table renormalises the kept weights and the surrogates scale them by "
                "a gain of their own; 1 renormalises. Use GatingTable(..., renormalise=False)."
            )
        return value

    def tensors(self, value: Surrogates) -> Surrogates:
        """Return the surrogates."""
        return value

    def to_json(self, value: Surrogates, name: str) -> dict[str, Any]:
        """Return what names the surrogates' file, with what a reader wants to know."""
        return {
            "kind": SURROGATES,
            "file": file_of(value, name),
            "sha256": value.sha256,
            "method": value.method,
            "ranks": list(value.ranks),
            "gain": value.gain.tolist(),
            "n_values": value.n_bytes(1),
        }

    def from_json(self, saved: SavedSection) -> Surrogates:
        """Return the surrogates from beside the config."""
        names = ("kind", "file", "sha256", "method", "ranks", "gain", "n_values")
        values = known_values(saved.values, saved.source, names)
        if values["kind"] != SURROGATES:
            raise RecordError(
                f"{saved.path} asks for compensation by {values['kind']!r}; expected "
                f"{SURROGATES!r}."
            )
        return Surrogates.load(file_beside(saved.path, values["file"]), values["sha256"])


class PlanSection(ConfigSection[CachePlan]):
    """How many slots every layer has, and which experts are pinned in them."""

    name = "plan"

    def checked(self, value: CachePlan, config: TunedConfig) -> CachePlan:
        """Refuse a plan for another shape of model."""
        n_layers, n_experts = config.model["n_layers"], config.model["n_experts"]
        if len(value.slots) != n_layers:
            raise RecordError(
                f"The cache plan has {len(value.slots)} layers; the model has {n_layers}."
            )
        pinned = value.pinned or ()
        if any(not 0 <= expert < n_experts for layer in pinned for expert in layer):
            raise RecordError(f"Pinned experts must lie in 0..{n_experts - 1}, got {pinned}.")
        return value

    def from_json(self, saved: SavedSection) -> CachePlan:
        """Return the saved plan."""
        return CachePlan.from_json(saved.values, saved.source)


class EvictionSection(ConfigSection[str]):
    """The name of the policy that says which expert leaves its slot.

    Whether there is such a policy, and whether it keeps what the plan pins, is known where a config
    is run or simulated.
    """

    name = "eviction"
    can_be_off = False

    def checked(self, value: str, config: TunedConfig) -> str:
        """Refuse what is no name."""
        if not isinstance(value, str) or not value:
            raise RecordError(f"Eviction must be the name of a policy, got {value!r}.")
        return value

    def fingerprint(self, value: str, config: TunedConfig) -> str:
        """Return the name."""
        return value

    def to_json(self, value: str, name: str) -> dict[str, Any]:
        """Return the name as the section holds it."""
        return {"policy": value}

    def from_json(self, saved: SavedSection) -> str:
        """Return the saved name."""
        return known_values(saved.values, saved.source, ("policy",))["policy"] or "lru"


class PrefetchSection(ConfigSection[PrefetchTable]):
    """What is prefetched; fitted predictors lie in a file of tensors."""

    name = "prefetch"

    def checked(self, value: PrefetchTable, config: TunedConfig) -> PrefetchTable:
        """Refuse a table, or predictors, of another model."""
        n_layers, fitted = config.model["n_layers"], value.fitted
        if value.n_layers != n_layers:
            raise RecordError(
                f"The prefetch table is for {value.n_layers} layers; the model has {n_layers}."
            )
        if fitted is not None and not is_of_model(fitted.model_fingerprint, config):
            raise RecordError(
                f"The predictors were fitted to a model of fingerprint {fitted.model_fingerprint}; "
                f"the config is for {config.model['id']!r}, fingerprint "
                f"{config.model['fingerprint']}. Fit predictors to this model."
            )
        return value

    def tensors(self, value: PrefetchTable) -> Predictors | None:
        """Return what was fitted."""
        return value.fitted

    def to_json(self, value: PrefetchTable, name: str) -> dict[str, Any]:
        """Return the table, with the file of what was fitted for it."""
        fitted = value.fitted
        named = {"file": file_of(fitted, name), "sha256": fitted.sha256} if fitted else {}
        return {**value.to_json(), "fitted": named or None}

    def from_json(self, saved: SavedSection) -> PrefetchTable:
        """Return the saved table, what was fitted for it from beside the config."""
        names = ("sources", "buffer_slots", "fitted")
        values = known_values(saved.values, saved.source, names)
        named, fitted = values.pop("fitted"), None
        if named:
            named = known_values(named, f"{saved.source} 'fitted',", ("file", "sha256"))
            fitted = Predictors.load(file_beside(saved.path, named["file"]), named["sha256"])
        return PrefetchTable.from_json(values, fitted, saved.source)


class PrecisionSection(ConfigSection[PrecisionPlan]):
    """How every expert is stored."""

    name = "precision"

    def checked(self, value: PrecisionPlan, config: TunedConfig) -> PrecisionPlan:
        """Refuse a plan for another shape of model."""
        shape, wanted = value.shape, (config.model["n_layers"], config.model["n_experts"])
        if shape is not None and shape != wanted:
            raise RecordError(
                f"The precision plan is for {shape[0]} layers of {shape[1]} experts; the model has "
                f"{wanted[0]} layers of {wanted[1]}."
            )
        return value

    def from_json(self, saved: SavedSection) -> PrecisionPlan:
        """Return the saved plan."""
        shape = saved.model["n_layers"], saved.model["n_experts"]
        return PrecisionPlan.from_json(shape, saved.values, saved.source)


class HardwareSection(ConfigSection[HardwareProfile]):
    """The machine that the config was tuned for."""

    name = "hardware"

    def fingerprint(self, value: HardwareProfile, config: TunedConfig) -> str | None:
        """Identify the machine's times if they decide anything: what is prefetched."""
        return value.fingerprint() if config.prefetch is not None else None

    def from_json(self, saved: SavedSection) -> HardwareProfile:
        """Return the saved profile."""
        return HardwareProfile.from_json(saved.values, saved.source)


class EvidenceSection(ConfigSection[Mapping[str, Any]]):
    """What was predicted and measured, which changes nothing of what a config does."""

    name = "evidence"
    can_be_off = False
    decides = False

    def checked(self, value: Mapping[str, Any], config: TunedConfig) -> Mapping[str, Any]:
        """Freeze the mapping."""
        return MappingProxyType(dict(value))

    def to_json(self, value: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        """Return the entries; None if there are none."""
        return dict(value) or None

    def from_json(self, saved: SavedSection) -> Mapping[str, Any]:
        """Return the saved entries."""
        return saved.values


SECTIONS: tuple[ConfigSection[Any], ...] = (
    GatingSection(),
    CompensationSection(),
    PlanSection(),
    EvictionSection(),
    PrefetchSection(),
    PrecisionSection(),
    HardwareSection(),
    EvidenceSection(),
)
