"""Kinds of events in a timeline, as its log numbers them."""

EVENT_KINDS = ("dense", "expert", "demand", "ahead")
"""Computing beside the experts; one expert computed; an expert brought when it was needed, or the
rest of one whose prefetch was begun; a chunk of a prefetch."""

DENSE, EXPERT, DEMAND, AHEAD = range(len(EVENT_KINDS))
"""Places in `EVENT_KINDS`."""
