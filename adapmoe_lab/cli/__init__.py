"""The command line: `adapmoe-lab` and its commands."""

from adapmoe_lab.cli.program import main

__all__ = ["main"]
