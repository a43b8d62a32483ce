"""Which resident expert leaves first."""
