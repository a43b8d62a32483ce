"""Figures of prediction and prefetch."""
