"""Figures of slots and evictions."""
