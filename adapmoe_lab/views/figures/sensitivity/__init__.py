"""Figures of sensitivity and its estimators."""
