"""What becomes of a member of a step's set."""

HIT, LOAD, STREAM = range(3)
"""It was resident before the step, it gets a slot, or it passes through staging uncached."""
