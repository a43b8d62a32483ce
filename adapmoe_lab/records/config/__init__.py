"""A tuned configuration and its sections, one class each."""

from adapmoe_lab.records.config.tuned_config import TunedConfig

__all__ = ["TunedConfig"]
