"""Texts from a model: tokens one by one, their text as it comes, conversations."""
