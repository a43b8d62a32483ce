"""What would happen: replay of a trace under a config, and the cost of it."""
