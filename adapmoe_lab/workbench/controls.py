"""The controls of the workbench: they turn what a person does into a candidate, and say so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ipywidgets
import numpy as np

from adapmoe_lab.records import OFF
from adapmoe_lab.records.prefetch import buffer_bytes
from adapmoe_lab.simulation.search.prefetch_search import buffer_slots
from adapmoe_lab.views.widgets import OwningBox, ThresholdCurve
from adapmoe_lab.workbench.session import Cache, Candidate, Session

BY_HAND = "by hand"
BUDGET_STEP = 0.005
RULE_NAMES = {
    "uniform": "one cut for all layers",
    "adapmoe": "AdapMoE's sensitivity rule",
    "curve": "least predicted loss",
}
"""What rules are called on screen; others by their own name."""


class Controls(OwningBox):
    """One budget slider, one cut per layer, one cache size, and how far is prefetched.

    Attributes:
        candidate: what the controls say now.
    """

    def __init__(self, session: Session, on_change: Callable[[Candidate], None]) -> None:
        """Build the controls for a session; `on_change` receives every new candidate."""
        self._session = session
        self._on_change = on_change
        self._lock = threading.RLock()  # callbacks may come on two threads
        self._is_following = False
        self._followed_budget: float | None = None
        spec = session.trace.spec
        wide = {"layout": {"width": "98%"}, "style": {"description_width": "130px"}}
        self.budget = ipywidgets.FloatSlider(
            0.0, min=0.0, max=spec.max_skipped_fraction, step=BUDGET_STEP,
            description="Experts skipped", readout_format=".1%", **wide,
        )  # fmt: skip
        self.rule = ipywidgets.Dropdown(
            options=[(RULE_NAMES.get(name, name), name) for name in session.rules],
            description="Chosen by", **wide,
        )  # fmt: skip
        self.slots = ipywidgets.IntSlider(
            max(1, spec.n_experts // 2), min=1, max=spec.n_experts,
            description="Experts kept", **wide,
        )  # fmt: skip
        self.ahead = ipywidgets.IntSlider(
            0, min=0, max=max(1, session.max_layers_ahead), description="Layers ahead",
            disabled=not session.max_layers_ahead, **wide,
        )  # fmt: skip
        self.memory = ipywidgets.HTML()
        self.candidate = session.suggestion(self.rule.value, self._cache)
        self._follow_budget()
        self.curve = ThresholdCurve(
            values=self.candidate.cuts.tolist(),
            baseline=self.candidate.cuts.tolist(),
            baseline_text="chosen by the rule",
            vmin=1 / spec.top_k,
            vmax=1.0,
            step=0.005,
            label="Cut on the share of the best expert",
        )
        self.budget.observe(self._budget_moved, "value")
        self.rule.observe(self._budget_moved, "value")
        self.slots.observe(self._cache_moved, "value")
        self.ahead.observe(self._cache_moved, "value")
        self.curve.observe(self._curve_moved, "values")
        self.curve.observe(self._curve_moved, "committed")
        self._show_memory()
        rows = [self.budget, self.rule, self.slots, self.memory, self.ahead, self.curve]
        super().__init__(rows)

    @property
    def _cache(self) -> Cache:
        return Cache(self.slots.value, self.ahead.value)

    @contextmanager
    def _following(self) -> Iterator[None]:
        """Let one control follow another without taking it for a person's move."""
        self._is_following = True
        try:
            yield
        finally:
            self._is_following = False

    def _follow_budget(self) -> None:
        """Show what the candidate skips; a slider sends back what it was given, in its steps."""
        fraction = self._session.skipped_fraction(self.candidate)
        steps = round(fraction / BUDGET_STEP)
        self._followed_budget = self.budget.value = steps * BUDGET_STEP

    def _is_echo(self) -> bool:
        followed = self._followed_budget
        return followed is not None and abs(self.budget.value - followed) < BUDGET_STEP / 2

    def _budget_moved(self, change: dict[str, object]) -> None:
        with self._lock:
            if self._is_following or (change["owner"] is self.budget and self._is_echo()):
                return
            self._followed_budget = None
            candidate = self._session.candidate(self.rule.value, self.budget.value, self._cache)
            with self._following():
                self.curve.values = self.curve.baseline = candidate.cuts.tolist()
            self._set(candidate)

    def _curve_moved(self, change: dict[str, object]) -> None:
        with self._lock:
            if self._is_following:
                return
            shown = np.array(change["new"], dtype=np.float64)
            cuts = np.where(shown >= self.curve.vmax, OFF, shown)
            candidate = Candidate(cuts, self._cache, BY_HAND)
            if candidate.key == self.candidate.key:
                return
            self._set(candidate)
            with self._following():
                self._follow_budget()

    def _cache_moved(self, _: object) -> None:
        with self._lock:
            self._show_memory()
            self._set(Candidate(self.candidate.cuts, self._cache, self.candidate.chosen_by))

    def _set(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self._on_change(candidate)

    def _show_memory(self) -> None:
        spec = self._session.trace.spec
        ahead = buffer_slots(spec) if self.ahead.value else 0
        kept = self.slots.value * int(spec.slot_bytes.sum())
        kept += buffer_bytes(ahead, spec.stored_expert_bytes)
        self.memory.value = (
            f"<small style='margin-left:136px'>of {spec.n_experts} per layer"
            f"{f', {ahead} ahead' if ahead else ''}: "
            f"{kept / 2**20:.1f} MiB, {kept / spec.all_experts_bytes:.0%} of all experts</small>"
        )
