"""Fitting what predicts the experts of a later layer."""
