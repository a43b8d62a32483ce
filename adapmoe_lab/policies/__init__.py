"""Who decides: gating, eviction and allocation, as values. No model, no device."""
