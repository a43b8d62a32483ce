"""How a budget becomes slots and ranks."""
