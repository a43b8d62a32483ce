"""AdapMoE Lab: see, tune and run Mixture-of-Experts models whose experts do not fit the GPU.

Importing the package loads nothing heavy; each name below loads what it needs on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapmoe_lab.engine.loading import load
    from adapmoe_lab.evaluation.harness import evaluate
    from adapmoe_lab.evaluation.latency import measure_latency
    from adapmoe_lab.evaluation.loss import evaluate_loss
    from adapmoe_lab.evaluation.texts import calibration_labels, calibration_texts, read_texts
    from adapmoe_lab.policies.allocation.slots import plan_slots
    from adapmoe_lab.profiling.hardware.probe import probe_hardware
    from adapmoe_lab.profiling.predictors.fit import fit_predictors
    from adapmoe_lab.profiling.routing.profile import profile
    from adapmoe_lab.profiling.sensitivity.sensitivity import sensitivities, sensitivity
    from adapmoe_lab.profiling.surrogates.fit import fit_surrogates
    from adapmoe_lab.records import (
        HardwareProfile,
        Predictors,
        RoutingTrace,
        SensitivityProfile,
        Surrogates,
        TunedConfig,
    )
    from adapmoe_lab.records.published import published_adapmoe
    from adapmoe_lab.simulation.replay.miss_curves import miss_curves
    from adapmoe_lab.simulation.search.prefetch_search import plan_prefetch
    from adapmoe_lab.simulation.simulate import simulate
    from adapmoe_lab.tuning.compare import run_bench
    from adapmoe_lab.tuning.tune import tune
    from adapmoe_lab.workbench.panel import Workbench

__version__ = "0.1.0"

_HOMES = {
    "HardwareProfile": "records",
    "Predictors": "records",
    "RoutingTrace": "records",
    "SensitivityProfile": "records",
    "Surrogates": "records",
    "TunedConfig": "records",
    "Workbench": "workbench.panel",
    "calibration_labels": "evaluation.texts",
    "calibration_texts": "evaluation.texts",
    "evaluate": "evaluation.harness",
    "evaluate_loss": "evaluation.loss",
    "fit_predictors": "profiling.predictors.fit",
    "fit_surrogates": "profiling.surrogates.fit",
    "load": "engine.loading",
    "measure_latency": "evaluation.latency",
    "miss_curves": "simulation.replay.miss_curves",
    "plan_prefetch": "simulation.search.prefetch_search",
    "plan_slots": "policies.allocation.slots",
    "probe_hardware": "profiling.hardware.probe",
    "profile": "profiling.routing.profile",
    "published_adapmoe": "records.published",
    "read_texts": "evaluation.texts",
    "run_bench": "tuning.compare",
    "sensitivities": "profiling.sensitivity.sensitivity",
    "sensitivity": "profiling.sensitivity.sensitivity",
    "simulate": "simulation.simulate",
    "tune": "tuning.tune",
}

__all__ = [
    "HardwareProfile",
    "Predictors",
    "RoutingTrace",
    "SensitivityProfile",
    "Surrogates",
    "TunedConfig",
    "Workbench",
    "calibration_labels",
    "calibration_texts",
    "evaluate",
    "evaluate_loss",
    "fit_predictors",
    "fit_surrogates",
    "load",
    "measure_latency",
    "miss_curves",
    "plan_prefetch",
    "plan_slots",
    "probe_hardware",
    "profile",
    "published_adapmoe",
    "read_texts",
    "run_bench",
    "sensitivities",
    "sensitivity",
    "simulate",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Load a public name from where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'adapmoe_lab' has no attribute {name!r}")
    return getattr(import_module(f"adapmoe_lab.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
