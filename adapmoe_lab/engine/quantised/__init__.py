"""Experts in few bits, and products with them."""
