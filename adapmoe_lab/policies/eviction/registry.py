"""Eviction policies by name. A policy of your own is one file and a call of `register`."""

from __future__ import annotations

from adapmoe_lab.policies.eviction.belady import BELADY
from adapmoe_lab.policies.eviction.hobbit import HOBBIT
from adapmoe_lab.policies.eviction.least_stale import LEAST_STALE
from adapmoe_lab.policies.eviction.lfu import LFU
from adapmoe_lab.policies.eviction.lfu_aged import LFU_AGED
from adapmoe_lab.policies.eviction.lru import LRU
from adapmoe_lab.policies.eviction.policy import EvictionPolicy
from adapmoe_lab.policies.eviction.router_average import ROUTER_AVERAGE
from adapmoe_lab.policies.eviction.static import STATIC
from adapmoe_lab.policies.registry import Registry

POLICIES: Registry[EvictionPolicy] = Registry("eviction policy", "eviction")
"""The policies that a config, a replay and a search may name, by name."""


def register(policy: EvictionPolicy) -> None:
    """Make a policy known by its name; the same one twice is no error.

    Raises:
        ValueError: another policy has this name.
    """
    POLICIES.add(policy.name, policy)


def unregister(name: str) -> None:
    """Forget the policy of a name.

    Raises:
        ValueError: there is none.
    """
    POLICIES.remove(name)


def policy_named(name: str) -> EvictionPolicy:
    """Return the policy of a name.

    Raises:
        ValueError: there is none; the text lists those there are.
    """
    return POLICIES.named(name)


for _policy in (LRU, LFU, LFU_AGED, ROUTER_AVERAGE, LEAST_STALE, HOBBIT, STATIC, BELADY):
    register(_policy)
