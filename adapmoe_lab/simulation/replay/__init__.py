"""What becomes of the experts of a recorded trace under a cache."""
