"""Named pairs of hardware and model that an emulated link imitates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapmoe_lab.records.listed import read_listed


@dataclass(frozen=True)
class LinkTarget:
    """A machine and model whose ratio of loading to computing an emulated link keeps.

    Attributes:
        name: what the target is called in arguments.
        hardware: the machine in words.
        model: the model in words.
        expert_bytes: bytes of one expert.
        link_bytes_per_s: bandwidth of the link.
        layer_s: seconds of one decode layer with every expert resident.
        source: where the numbers come from.
    """

    name: str
    hardware: str
    model: str
    expert_bytes: int
    link_bytes_per_s: float
    layer_s: float
    source: str

    @property
    def load_ratio(self) -> float:
        """Time to load one expert over the resident time of one layer."""
        return self.expert_bytes / self.link_bytes_per_s / self.layer_s


def load_targets(path: Path) -> dict[str, LinkTarget]:
    """Read link targets by name; the first is the default.

    Raises:
        RecordError: the file is not a list of targets.
    """
    targets = read_listed(path, LinkTarget, "targets", "link targets")
    return {target.name: target for target in targets}
