"""What one layer fetches in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from adapmoe_lab.engine.transfer.prefetch_copy import PrefetchCopy
from adapmoe_lab.policies.eviction.expert_cache import Load, StepPlan


@dataclass(frozen=True)
class GroupedFetch:
    """The experts of a step that are read in groups.

    Attributes:
        experts: all of them, in the order that they arrive.
        addresses: where each will lie on the device.
        arrivals: yields groups of them, in that order, each when it can be read and until the next
            is asked for.
    """

    experts: Sequence[int]
    addresses: Sequence[int]
    arrivals: Iterator[Sequence[int]]


@dataclass(frozen=True)
class LayerStep:
    """What one layer fetches in one forward pass, as it was decided.

    Attributes:
        layer: number of the MoE layer.
        plan: what the cache decided.
        begun: prefetches of what is missing.
        loads: where the missing experts go that get a slot, by expert.
        beside: buffers of those that get none.
        n_at_once: how many of these are staged at once, twice.
    """

    layer: int
    plan: StepPlan
    begun: Mapping[int, PrefetchCopy]
    loads: Mapping[int, Load]
    beside: Mapping[int, torch.Tensor]
    n_at_once: int

    @property
    def hits(self) -> Sequence[int]:
        """Those that were resident before."""
        return self.plan.hits

    @property
    def demanded_loads(self) -> Sequence[int]:
        """Those that get a slot and were not prefetched."""
        return [expert for expert in self.loads if expert not in self.begun]

    @property
    def streamed(self) -> Sequence[int]:
        """Those that get none and were not prefetched."""
        return [expert for expert in self.beside if expert not in self.begun]

    @property
    def streamed_groups(self) -> list[Sequence[int]]:
        """The same, in the groups that are staged together."""
        streamed = self.streamed
        begins = range(0, len(streamed), self.n_at_once)
        return [streamed[begin : begin + self.n_at_once] for begin in begins]


def in_groups(experts: Sequence[int], n_groups: int) -> list[Sequence[int]]:
    """Return experts in their order in a number of groups, or fewer if they are fewer."""
    n_groups = min(n_groups, len(experts))
    ends = [len(experts) * number // max(n_groups, 1) for number in range(n_groups + 1)]
    return [experts[begin:end] for begin, end in pairwise(ends)]
