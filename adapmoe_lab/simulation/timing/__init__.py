"""When everything of a replay happens."""
