"""What an eviction policy is: traits and plain functions of one expert's numbers.

Every policy keeps one priority per expert. Of those that may leave, the one with the smallest
priority goes first, ties to the lowest layer and id. The functions are plain arithmetic that takes
numbers as well as arrays: what runs a model calls them as they stand, simulation compiles them, so
that both decide alike.

Priorities are int64, from 0 to below `PROTECTED`, for as many as 2^58 steps. Stamps and counts are
whole numbers, averages are in fixed point and forget by integer division: nothing depends on the
order of sums, on the machine or on how long it has run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from adapmoe_lab.records import CachePlan

PROTECTED = 2**62
"""The priority of what may not leave; above any other, and any other less its penalty."""

NEXT_USE: Literal["next use"] = "next use"
"""The oracle input of policies that know the future: the time of an expert's next use."""


class Use(NamedTuple):
    """One use of an expert: a member of the set that its layer needs in a step.

    Attributes:
        was_resident: 1 for an expert resident before the step, 0 for a miss.
        oracle_input: what the policy's `oracle_input` gives for the use, 0 without one.
        clock: steps before this one, of all layers that share the slots.
        n_layers: number of layers that share the slots.
        n_passes: forward passes before this one, `clock // n_layers`; given, since a division for
            every use takes long.
    """

    was_resident: Any
    oracle_input: Any
    clock: Any
    n_layers: Any
    n_passes: Any


@dataclass(frozen=True)
class EvictionPolicy:
    """An order in which experts leave. It decides; it moves nothing.

    Functions read constants and may call others of their kind, by a name and not through a module.
    Those that are None have no part in the policy. A step calls `on_new_pass` if it is the pool's
    first of a pass, `on_new_step`, `on_scores`, and `after_use` for each member of its set, in this
    order.

    Attributes:
        name: what a config calls it.
        after_use: priority and state of a member of a step's set, from both as they were and its
            `Use`.
        on_new_pass: an expert's priority as a forward pass begins.
        on_new_step: an expert's priority as its layer's step begins, used or not.
        on_scores: the same for policies that read the router's scores: from the priority and the
            mean score of the expert, as `fixed_point.mean_score` gives it.
        oracle_input: what is known of each use beforehand. `NEXT_USE`, or a function of the sums
            of the router's scores of the step's set, and the place of the member in the set.
        penalty_per_layer: what priorities lose for every layer that is still to come before the
            expert's own, from the number of forward passes before this one.
        keeps_state: whether the state that `after_use` returns is kept; else it is always 0.
        pins: whether it keeps the plan's pinned experts.
    """

    name: str
    after_use: Callable[[Any, Any, Use], tuple[Any, Any]]
    on_new_pass: Callable[[Any], Any] | None = None
    on_new_step: Callable[[Any], Any] | None = None
    on_scores: Callable[[Any, Any], Any] | None = None
    oracle_input: Literal["next use"] | Callable[[Any, int], Any] | None = None
    penalty_per_layer: Callable[[Any], Any] | None = None
    keeps_state: bool = False
    pins: bool = False

    @property
    def needs_scores(self) -> bool:
        """Whether it reads the router's scores, not only which experts were used."""
        return self.on_scores is not None or callable(self.oracle_input)

    @property
    def needs_future(self) -> bool:
        """Whether it reads what comes later, so that only simulation can follow it."""
        return self.oracle_input == NEXT_USE

    @property
    def host_only(self) -> bool:
        """Whether a step captured as a graph on the device cannot follow it.

        It then takes more than one priority per expert and a rule for the priorities of the step's
        own layer.
        """
        reaches_further = (self.on_new_pass, self.oracle_input, self.penalty_per_layer)
        return self.keeps_state or any(trait is not None for trait in reaches_further)

    def check_runnable(self) -> None:
        """Raise ValueError if only a simulation can follow it."""
        if self.needs_future:
            raise ValueError(
                f"Eviction {self.name!r} reads what comes later, as only a simulation of a "
                "recorded trace can. Run the model with another policy."
            )

    def check_on_device(self) -> None:
        """Raise ValueError if a step captured as a graph on the device cannot follow it."""
        self.check_runnable()
        if self.host_only:
            raise ValueError(
                f"Eviction {self.name!r} needs the host: a graph on the device keeps one priority "
                "per expert and changes those of the step's own layer only. Use the host-driven "
                "executor, or another policy."
            )

    def check_plan(self, plan: CachePlan | None) -> None:
        """Raise ValueError unless it keeps pinned experts exactly if a plan pins some."""
        has_pins = plan is not None and plan.pinned is not None
        if has_pins != self.pins:
            keeps = "the pinned experts of a plan" if self.pins else "no pinned experts"
            raise ValueError(
                f"Eviction {self.name!r} keeps {keeps}, and this plan pins "
                f"{'some' if has_pins else 'none'}; change the one or the other."
            )

    def check_scores(self, scores: Any) -> None:
        """Raise ValueError if it reads the router's scores and there are none."""
        if self.needs_scores and scores is None:
            raise ValueError(
                f"Eviction {self.name!r} reads the router's scores; give those of the step's "
                "tokens."
            )
