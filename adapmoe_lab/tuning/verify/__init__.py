"""Whether a model does on this machine what the project says, check by check."""
