"""What the parts of a decode step take, solved from steps that differ in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

N_SCALED = 4
"""Rounds of telling slow decodes from expensive parts, after which both no longer change."""
N_REWEIGHTED = 30
"""Rounds of reweighting after which the least absolute errors no longer change."""
SMALL_ERROR, TINY_S = 0.01, 1e-9
"""Errors count as alike below this share of their median, and below these seconds."""


@dataclass(frozen=True, eq=False)
class TimedStep:
    """One timed decode step.

    Attributes:
        seconds: what it took.
        n_run: experts run, of all layers.
        is_gated: whether a gate said which experts are run.
        n_queries: how often a predictor was queried about a layer.
        n_query_points: at how many hook points of layers any was.
        n_output_points: how many of these were layers' outputs.
        hits: resident experts run, by layer [L].
        misses: experts loaded, by layer [L].
    """

    seconds: float
    n_run: int
    is_gated: bool
    n_queries: int
    n_query_points: int
    n_output_points: int
    hits: NDArray[np.int64]
    misses: NDArray[np.int64]

    @property
    def counts(self) -> dict[str, int]:
        """How often the step takes each cost, by the cost's name in a `HardwareProfile`.

        A cost that is to be solved for is one line here.
        """
        return {
            "dense_step_s": 1,
            "expert_s": self.n_run,
            "gate_s": self.is_gated * len(self.hits),
            "predict_s": self.n_queries * (not self.is_gated),
            "gated_predict_s": self.n_queries * self.is_gated,
            "predict_overhead_s": self.n_query_points,
            "predict_output_overhead_s": self.n_output_points,
            "miss_s": int(self.misses.sum()),
        }


def solved_costs(
    decodes: Sequence[Sequence[TimedStep]], miss_s: float | None, alone_s: float
) -> dict[str, float]:
    """Return the costs of `TimedStep.counts` that leave the least absolute errors, in seconds.

    Where a whole decode was slower or faster than the others, so are all its parts: what else the
    machine did then is taken out first. A cost that no two steps take unlike often is left out.
    Costs that would be negative are left out of the sum, those that take most off a step first, and
    are zero. Misses take no part in the result: they take `miss_s` each, or what is solved for.

    Args:
        decodes: the steps of each decode.
        miss_s: seconds of a miss, if they are known.
        alone_s: seconds of an expert alone, which is its cost where a router chooses one expert.
    """
    found = _solved(decodes, miss_s, alone_s)
    found.pop("miss_s", None)
    return found


def replayed_costs(decodes: Sequence[Sequence[TimedStep]]) -> tuple[dict[str, float], float | None]:
    """Return the costs of steps that are replayed, and the seconds of a miss among them.

    A miss is read by whoever multiplies with it, so that it takes what crosses the link, and the
    host has no part in it. None where no two steps missed unlike often.

    Args:
        decodes: the steps of each decode.
    """
    found = _solved(decodes, None, 0.0)
    return found, found.pop("miss_s", None)


def _solved(
    decodes: Sequence[Sequence[TimedStep]], miss_s: float | None, alone_s: float
) -> dict[str, float]:
    """Return all costs that steps tell apart, those of misses too if they are not known."""
    steps = [step for decode in decodes for step in decode]
    seconds = np.array([step.seconds for step in steps])
    counts = [step.counts for step in steps]
    columns = {name: np.array([c[name] for c in counts], dtype=np.float64) for name in counts[0]}
    if miss_s is not None:
        seconds = seconds - columns.pop("miss_s") * miss_s
    has_choice = bool(np.ptp(columns["expert_s"]))
    if not has_choice:
        seconds = seconds - columns.pop("expert_s") * alone_s
    names = [name for name, column in columns.items() if name == "dense_step_s" or np.ptp(column)]
    table = np.stack([columns[name] for name in names], axis=1)
    found = dict(zip(names, _unscaled_costs(table, seconds, decodes), strict=True))
    return found if has_choice else {**found, "expert_s": alone_s}


def _unscaled_costs(
    table: NDArray[np.float64],
    seconds: NDArray[np.float64],
    decodes: Sequence[Sequence[TimedStep]],
) -> list[float]:
    """Return what each column adds to a step of a decode that is as fast as most."""
    lengths = [len(decode) for decode in decodes]
    ends, slowness, solution = np.cumsum(lengths)[:-1], np.ones(len(decodes)), np.zeros(0)
    for _ in range(N_SCALED):
        solution = _least_absolute_parts(table, seconds / np.repeat(slowness, lengths))
        ratios = seconds / np.maximum(table @ solution, TINY_S)
        slowness = np.array([np.median(own) for own in np.split(ratios, ends)])
        slowness /= np.median(slowness)
    return solution.tolist()


def _least_absolute_parts(
    table: NDArray[np.float64], seconds: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return what each column adds, none of it negative; the first is left out last."""
    parts, kept = np.zeros(table.shape[1]), list(range(table.shape[1]))
    while True:
        solution = least_absolute(table[:, kept], seconds)
        worst = int((solution * table[:, kept].max(axis=0)).argmin())
        if solution[worst] >= 0 or worst == 0:
            parts[kept] = np.maximum(0.0, solution)
            return parts
        del kept[worst]


def least_absolute(
    columns: NDArray[np.float64], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the x [P] of the least sum of |columns [N, P] @ x - values [N]|.

    By least squares reweighted again and again: how far off a few values are matters little.
    """
    weights = np.ones(len(values))
    solution = np.zeros(columns.shape[1])
    for _ in range(N_REWEIGHTED):
        root = np.sqrt(weights)
        solution = np.linalg.lstsq(columns * root[:, None], values * root, rcond=None)[0]
        errors = np.abs(columns @ solution - values)
        weights = 1 / np.maximum(errors, max(SMALL_ERROR * float(np.median(errors)), TINY_S))
    return solution
