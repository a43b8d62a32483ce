"""Bringing bytes from the host to the device, and the time that takes."""
