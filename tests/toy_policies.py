"""Policies that the package does not know, each as its users would write one."""

from __future__ import annotations

from adapmoe_lab.policies.eviction.policy import EvictionPolicy

LATEST = 2**60


def time_left(clock):
    """Return what is left of time, twice the clock: policies may call functions of their own."""
    return LATEST - 2 * clock


def after_use(_, state, use):
    """Return the time that is left after the use: of one step, hits come before misses."""
    return time_left(use.clock) - 1 + use.was_resident, state


TOY = EvictionPolicy("toy", after_use)
"""The most recently used expert leaves first."""
