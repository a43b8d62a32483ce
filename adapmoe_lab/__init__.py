"""AdapMoE Lab: see, tune and run Mixture-of-Experts models whose experts do not fit the GPU.

Importing the package loads nothing heavy; each name below loads what it needs on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapmoe_lab.engine.loading import load
    from adapmoe_lab.engine.observing import observing
    from adapmoe_lab.evaluation.harness import evaluate
    from adapmoe_lab.evaluation.latency import measure_latency
    from adapmoe_lab.evaluation.loss import evaluate_loss
    from adapmoe_lab.evaluation.texts import calibration_labels, calibration_texts, read_texts
    from adapmoe_lab.policies.allocation.slots import (
        adapmoe_loads,
        budget_bytes,
        plan_slots,
        slots_plan,
        uniform_plan,
    )
    from adapmoe_lab.policies.gating.registry import RULES, largest_skipped_fraction
    from adapmoe_lab.profiling.hardware.probe import probe_hardware
    from adapmoe_lab.profiling.predictors.fit import fit_predictors
    from adapmoe_lab.profiling.routing.profile import profile
    from adapmoe_lab.profiling.sensitivity.sensitivity import sensitivities, sensitivity
    from adapmoe_lab.profiling.surrogates.fit import fit_surrogates
    from adapmoe_lab.records import (
        CachePlan,
        HardwareProfile,
        Predictors,
        RoutingTrace,
        SensitivityProfile,
        Surrogates,
        TunedConfig,
    )
    from adapmoe_lab.records.hook_points import HookPoint
    from adapmoe_lab.records.published import published_adapmoe
    from adapmoe_lab.simulation.replay.miss_curves import miss_curves
    from adapmoe_lab.simulation.search.cache_search import cache_choices, slot_divisions
    from adapmoe_lab.simulation.search.prefetch_search import (
        best_prefetch,
        buffer_slots,
        plan_prefetch,
        prefetch_choices,
    )
    from adapmoe_lab.simulation.simulate import simulate
    from adapmoe_lab.simulation.statistics.predictability import with_baselines
    from adapmoe_lab.tuning.compare import run_bench
    from adapmoe_lab.tuning.tune import tune
    from adapmoe_lab.tuning.verify.verify import verify
    from adapmoe_lab.views import figures
    from adapmoe_lab.workbench.panel import Workbench

__version__ = "0.1.0"

_HOMES = {
    "RULES": "policies.gating.registry",
    "CachePlan": "records",
    "HardwareProfile": "records",
    "HookPoint": "records.hook_points",
    "Predictors": "records",
    "RoutingTrace": "records",
    "SensitivityProfile": "records",
    "Surrogates": "records",
    "TunedConfig": "records",
    "Workbench": "workbench.panel",
    "adapmoe_loads": "policies.allocation.slots",
    "best_prefetch": "simulation.search.prefetch_search",
    "budget_bytes": "policies.allocation.slots",
    "buffer_slots": "simulation.search.prefetch_search",
    "cache_choices": "simulation.search.cache_search",
    "calibration_labels": "evaluation.texts",
    "calibration_texts": "evaluation.texts",
    "evaluate": "evaluation.harness",
    "evaluate_loss": "evaluation.loss",
    "fit_predictors": "profiling.predictors.fit",
    "fit_surrogates": "profiling.surrogates.fit",
    "largest_skipped_fraction": "policies.gating.registry",
    "load": "engine.loading",
    "measure_latency": "evaluation.latency",
    "miss_curves": "simulation.replay.miss_curves",
    "observing": "engine.observing",
    "plan_prefetch": "simulation.search.prefetch_search",
    "plan_slots": "policies.allocation.slots",
    "prefetch_choices": "simulation.search.prefetch_search",
    "probe_hardware": "profiling.hardware.probe",
    "profile": "profiling.routing.profile",
    "published_adapmoe": "records.published",
    "read_texts": "evaluation.texts",
    "run_bench": "tuning.compare",
    "sensitivities": "profiling.sensitivity.sensitivity",
    "sensitivity": "profiling.sensitivity.sensitivity",
    "simulate": "simulation.simulate",
    "slot_divisions": "simulation.search.cache_search",
    "slots_plan": "policies.allocation.slots",
    "tune": "tuning.tune",
    "uniform_plan": "policies.allocation.slots",
    "verify": "tuning.verify.verify",
    "with_baselines": "simulation.statistics.predictability",
}

_MODULES = {"figures": "views.figures"}

__all__ = [
    "RULES",
    "CachePlan",
    "HardwareProfile",
    "HookPoint",
    "Predictors",
    "RoutingTrace",
    "SensitivityProfile",
    "Surrogates",
    "TunedConfig",
    "Workbench",
    "adapmoe_loads",
    "best_prefetch",
    "budget_bytes",
    "buffer_slots",
    "cache_choices",
    "calibration_labels",
    "calibration_texts",
    "evaluate",
    "evaluate_loss",
    "figures",
    "fit_predictors",
    "fit_surrogates",
    "largest_skipped_fraction",
    "load",
    "measure_latency",
    "miss_curves",
    "observing",
    "plan_prefetch",
    "plan_slots",
    "prefetch_choices",
    "probe_hardware",
    "profile",
    "published_adapmoe",
    "read_texts",
    "run_bench",
    "sensitivities",
    "sensitivity",
    "simulate",
    "slot_divisions",
    "slots_plan",
    "tune",
    "uniform_plan",
    "verify",
    "with_baselines",
]


def __getattr__(name: str) -> Any:
    """Load a public name from where it lives."""
    if name in _MODULES:
        return import_module(f"adapmoe_lab.{_MODULES[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module 'adapmoe_lab' has no attribute {name!r}")
    return getattr(import_module(f"adapmoe_lab.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
