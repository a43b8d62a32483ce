"""`static`: the plan's pinned experts never leave, the others by least recent use."""

from __future__ import annotations

from adapmoe_lab.policies.eviction import lru
from adapmoe_lab.policies.eviction.policy import EvictionPolicy

STATIC = EvictionPolicy("static", lru.after_use, pins=True)
