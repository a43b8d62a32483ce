"""What a latency run measured: time and traffic, prefill apart from decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapmoe_lab.records.files import fields_of
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
        """Return plain JSON values that `from_json` reads back."""
        return {name: getattr(self, name).to_json() for name in self.__dataclass_fields__}

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], source: str = "The latency report"
    ) -> LatencyReport:
        """Build a report from what `to_json` returned.

        Raises:
            RecordError: a value is unknown, missing or wrong; the text names `source`.
        """
        parts = fields_of(cls, values, source)
        kinds: dict[str, Any] = {"prefill_traffic": Traffic, "decode_traffic": Traffic}
        read = {
            name: kinds.get(name, Measurement).from_json(part, f"{source}, {name},")
            for name, part in parts.items()
        }
        return cls(**read)


def merged(reports: Sequence[LatencyReport]) -> LatencyReport:
    """Return one report with the samples and traffic of several of the same config."""

    def together(parts: Sequence[Measurement]) -> Measurement:
        samples = np.concatenate([part.samples for part in parts])
        return Measurement(samples, parts[0].unit, parts[0].warmup, parts[0].conditions)

    return LatencyReport(
        prefill=together([r.prefill for r in reports]),
        decode=together([r.decode for r in reports]),
        decode_steps=together([r.decode_steps for r in reports]),
        prefill_traffic=sum((r.prefill_traffic for r in reports[1:]), reports[0].prefill_traffic),
        decode_traffic=sum((r.decode_traffic for r in reports[1:]), reports[0].decode_traffic),
    )
