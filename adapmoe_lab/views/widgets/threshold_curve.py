"""One cut per layer, drawn as a curve that can be dragged, painted and stepped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from adapmoe_lab.records import OFF

_FOLDER = Path(__file__).parent
_PROGRAM = ("threshold_axis.js", "threshold_curve.js")


class ThresholdCurve(anywidget.AnyWidget):
    """A draggable curve of one value per layer; the top of its axis means off.

    Drag a dot, or paint across layers from the background. On a focused dot, up and down move by
    `step` (with shift by ten), left and right go to the next layer. A value at or above `vmax`,
    or above one, is off; moving to the top gives `OFF`.

    Attributes:
        values: one value per layer, in layer order; follows every move.
        committed: the values at the last release or key.
        baseline: values to compare with, drawn behind; empty for none.
        baseline_text: what the baseline is called.
        vmin: bottom of the axis.
        vmax: top of the axis, labelled off.
        step: distance between values the curve gives.
        label: what the values are, above the curve.
        unit_text: what stands before a value where one is read out.
    """

    _esm = "".join((_FOLDER / name).read_text(encoding="utf-8") for name in _PROGRAM)
    _css = (_FOLDER / "threshold_curve.css").read_text(encoding="utf-8")

    values = traitlets.List(traitlets.Float()).tag(sync=True)
    committed = traitlets.List(traitlets.Float()).tag(sync=True)
    baseline = traitlets.List(traitlets.Float()).tag(sync=True)
    baseline_text = traitlets.Unicode("baseline").tag(sync=True)
    vmin = traitlets.Float(0.5).tag(sync=True)
    vmax = traitlets.Float(1.0).tag(sync=True)
    step = traitlets.Float(0.005).tag(sync=True)
    label = traitlets.Unicode("Cut on the share, by layer").tag(sync=True)
    unit_text = traitlets.Unicode("cut").tag(sync=True)
    _off = traitlets.Float(OFF, read_only=True).tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        """Set any of the traits; `committed` starts as `values`."""
        values = traits.get("values", [])
        super().__init__(**{"committed": list(values), **traits})

    @traitlets.validate("values", "committed", "baseline")
    def _check_values(self, proposal: Any) -> list[float]:
        name, values = proposal["trait"].name, proposal["value"]
        for layer, value in enumerate(values):
            if not math.isfinite(value) or value < 0:
                raise traitlets.TraitError(
                    f"{name} must be finite and not negative; layer {layer} has {value}. "
                    f"Use {OFF:g} for a layer that is off."
                )
        return values

    @traitlets.validate("vmin", "vmax")
    def _check_axis(self, proposal: Any) -> float:
        ends = {"vmin": self.vmin, "vmax": self.vmax, proposal["trait"].name: proposal["value"]}
        if not ends["vmin"] < ends["vmax"]:
            raise traitlets.TraitError(
                f"vmin must be below vmax, got {ends['vmin']} and {ends['vmax']}."
            )
        return proposal["value"]

    @traitlets.validate("step")
    def _check_step(self, proposal: Any) -> float:
        if not proposal["value"] > 0:
            raise traitlets.TraitError(f"step must be above zero, got {proposal['value']}.")
        return proposal["value"]
