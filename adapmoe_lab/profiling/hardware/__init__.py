"""What the parts of a decode step cost on this machine."""
