"""Figures of which experts run where."""
