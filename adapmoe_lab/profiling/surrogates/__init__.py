"""Fitting what is used in a skipped expert's place."""
