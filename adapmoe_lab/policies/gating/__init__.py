"""Which of a token's experts are run."""
