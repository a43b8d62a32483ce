"""Figures of skipping and what it costs."""
