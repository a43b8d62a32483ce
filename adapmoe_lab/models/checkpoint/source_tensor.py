"""A tensor of a checkpoint as one expert takes it."""

from __future__ import annotations

from dataclasses import dataclass

from adapmoe_lab.models.checkpoint.shard_file import TensorEntry


@dataclass(frozen=True)
class SourceTensor:
    """A checkpoint tensor that an expert is made of, and which converter takes it."""

    entry: TensorEntry
    pattern: str | None
    is_fused: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Axes of what one expert takes of it."""
        return self.entry.shape[self.is_fused :]

    @property
    def n_bytes(self) -> int:
        """Bytes of what one expert takes of it."""
        return self.entry.n_bytes // (self.entry.shape[0] if self.is_fused else 1)

    def offset(self, expert: int) -> int:
        """Bytes from the start of the file to what an expert takes of it."""
        return self.entry.offset + self.is_fused * expert * self.n_bytes
