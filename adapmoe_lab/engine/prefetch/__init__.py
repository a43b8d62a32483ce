"""Predicting the experts of later layers, and bringing them in the link's idle time."""
