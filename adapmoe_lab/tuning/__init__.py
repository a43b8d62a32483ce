"""Searches: from what was measured to a configuration."""
