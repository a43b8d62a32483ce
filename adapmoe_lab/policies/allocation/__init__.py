"""How a budget becomes slots and ranks; what notebooks of version 0.1 import is found here too."""

from adapmoe_lab.policies.allocation.slots import (
    adapmoe_loads,
    budget_bytes,
    slots_plan,
    uniform_plan,
)

__all__ = ["adapmoe_loads", "budget_bytes", "slots_plan", "uniform_plan"]
