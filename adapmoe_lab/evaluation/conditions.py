"""What a measurement depends on, so that unlike ones are not compared."""

from __future__ import annotations

from typing import Any

import torch

from adapmoe_lab.engine.device import device_name
from adapmoe_lab.engine.lab_model import LabModel


def measurement_conditions(model: LabModel) -> dict[str, Any]:
    """Return what every timing of a model depends on, beside its configuration.

    How its experts are stored is given as the config's section is, and in numbers.
    """
    return {
        "model": model.spec.fingerprint(),
        "compute_dtype": str(model.hf.dtype).removeprefix("torch."),
        "precision": model.spec.precision.fingerprint(),
        "experts_by_precision": model.spec.precision.counts,
        "device": device_name(model.engine.device),
        "link": model.link.name,
        "executor": model.engine.runs_steps_by,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
