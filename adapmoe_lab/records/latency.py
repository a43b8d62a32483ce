"""What a latency run measured: time and traffic, prefill apart from decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapmoe_lab.records.measurement import Measurement
from adapmoe_lab.records.traffic import Traffic


@dataclass(frozen=True, eq=False)
class LatencyReport:
    """Measured latency of one configuration.

    Attributes:
        prefill: seconds per prompt.
        decode: seconds per output token of each run, averaged over the run's tokens.
        decode_steps: seconds of every single output token.
        prefill_traffic: expert traffic of the prompts.
        decode_traffic: expert traffic of the output tokens.
    """

    prefill: Measurement
    decode: Measurement
    decode_steps: Measurement
    prefill_traffic: Traffic
    decode_traffic: Traffic

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {name: getattr(self, name).to_json() for name in self.__dataclass_fields__}
