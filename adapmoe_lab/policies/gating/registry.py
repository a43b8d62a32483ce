"""Gating rules by name. A rule of your own is one file and a call of `register`.

Each is prepared once for a trace and then gives a table in milliseconds, for a slider.
"""

from __future__ import annotations

from collections.abc import Callable

from adapmoe_lab.policies.gating.adapmoe import AdapMoERule
from adapmoe_lab.policies.gating.least_loss import LeastLoss
from adapmoe_lab.policies.gating.rule import Rule
from adapmoe_lab.policies.gating.uniform import UniformCut
from adapmoe_lab.policies.registry import Registry
from adapmoe_lab.records import RoutingTrace, SensitivityProfile
from adapmoe_lab.records.spec import max_skipped_fraction

N_BISECTIONS = 20

PreparedBy = Callable[[RoutingTrace, SensitivityProfile], Rule]
"""What prepares a rule for a trace."""

RULES: Registry[PreparedBy] = Registry("gating rule", "method")
"""Rules by the name that `tune` and the workbench know them by."""


def register(name: str, rule: PreparedBy) -> None:
    """Make a rule known by a name; the same one twice is no error.

    Raises:
        ValueError: another rule has this name.
    """
    RULES.add(name, rule)


def unregister(name: str) -> None:
    """Forget the rule of a name.

    Raises:
        ValueError: there is none.
    """
    RULES.remove(name)


def check_method(method: str) -> None:
    """Raise ValueError unless a rule has this name."""
    RULES.named(method)


def largest_skipped_fraction(
    rule: Rule, sensitivity: SensitivityProfile, top_k: int, max_loss_increase_nats: float
) -> float:
    """Return the largest skipped fraction whose predicted loss increase is allowed."""
    low, high = 0.0, max_skipped_fraction(top_k)
    for _ in range(N_BISECTIONS):
        middle = (low + high) / 2
        predicted, _ = sensitivity.total_increase(rule.table(middle).cuts[:, 0])
        allowed = predicted <= max_loss_increase_nats
        low, high = (middle, high) if allowed else (low, middle)
    return low


register("uniform", UniformCut)
register("adapmoe", AdapMoERule)
register("curve", LeastLoss)
