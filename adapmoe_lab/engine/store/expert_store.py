"""Every expert of a model as a buffer of bytes: in host memory, or on disk and read when needed."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from adapmoe_lab.engine.store.checksums import ChecksumManifest
from adapmoe_lab.engine.store.expert_buffer import expert_views, plain_tensors
from adapmoe_lab.models.experts import Weights
from adapmoe_lab.records import ExpertFormat
from adapmoe_lab.records.precision import aligned

BUFFER_ALIGNMENT = 256
"""Buffers start at multiples of this many bytes, for wide loads by kernels and buses."""

Formats = Sequence[Sequence[ExpertFormat]]
"""The layout of every expert, in (layer, expert) order; experts may differ in precision."""

BufferWriter = Callable[[int, int, torch.Tensor], None]
"""Writes the bytes of expert (layer, expert) into a buffer uint8 [n] on the host."""


def buffer_stride(layout: ExpertFormat) -> int:
    """Return the bytes from the start of an expert's buffer to that of the next."""
    return aligned(layout.n_bytes, BUFFER_ALIGNMENT)


class ExpertStore(ABC):
    """The experts of every layer, each a contiguous buffer of bytes on the host.

    Attributes:
        formats: the layout of every expert, [L][E].
        expert_bytes: stored bytes of every expert, int64 [L, E].
    """

    def __init__(self, formats: Formats) -> None:
        """Describe the experts of a store; a subclass says where they lie."""
        self.formats = tuple(tuple(layer) for layer in formats)
        self.expert_bytes = np.array(
            [[expert.n_bytes for expert in layer] for layer in self.formats], dtype=np.int64
        )

    @abstractmethod
    def buffer(self, layer: int, expert: int) -> torch.Tensor:
        """Return an expert's bytes, uint8 [n], valid as long as they are referred to."""

    def close(self) -> None:  # noqa: B027 nothing to give back unless a subclass says so
        """Give back what the store holds; it must not be used afterwards."""

    @property
    def n_layers(self) -> int:
        """L, the number of layers."""
        return len(self.formats)

    def n_experts(self, layer: int) -> int:
        """E, the number of experts of a layer."""
        return len(self.formats[layer])

    @property
    def n_bytes(self) -> int:
        """Stored bytes of all experts."""
        return int(self.expert_bytes.sum())

    def slot_bytes(self, layer: int) -> int:
        """Bytes of a slot that any expert of the layer fits into."""
        return int(self.expert_bytes[layer].max())

    def numbers(self) -> Iterator[tuple[int, int]]:
        """Yield the (layer, expert) numbers of every expert, in stored order."""
        for layer, experts in enumerate(self.formats):
            for expert in range(len(experts)):
                yield layer, expert

    def views(self, layer: int, expert: int, buffer: torch.Tensor) -> Weights:
        """Return an expert's weights as they lie in a buffer, wherever the buffer is."""
        return expert_views(buffer, self.formats[layer][expert])

    def fused(self, layer: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return a layer's tensors [E, ...] in a plain precision, the way transformers holds them.

        Packed experts are dequantised.
        """
        experts = [
            plain_tensors(self.buffer(layer, expert), layout, dtype)
            for expert, layout in enumerate(self.formats[layer])
        ]
        with torch.autocast("cpu", enabled=False):  # which refuses to stack float16
            return {name: torch.stack([expert[name] for expert in experts]) for name in experts[0]}


class HostStore(ExpertStore):
    """All experts in host memory, a slab of bytes per layer; pinned for asynchronous copies."""

    def __init__(self, formats: Formats, pinned: bool = False) -> None:
        """Allocate the slabs; `fill` puts the experts into them."""
        super().__init__(formats)
        self._offsets, sizes = [], []
        for layer in self.formats:
            ends = np.cumsum([0, *map(buffer_stride, layer)])
            self._offsets.append(ends.tolist())
            sizes.append(int(ends[-1]))
        self._slabs = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        self._unpin = weakref.finalize(self, _unpin, []) if not pinned else _pin(self, self._slabs)

    def fill(
        self, write: BufferWriter, after_expert: Callable[[int], None], n_threads: int = 1
    ) -> None:
        """Write every expert, `n_threads` at once; `after_expert` is told the bytes of each.

        If one fails, or the wait for them is interrupted, those not yet begun are left out.
        """

        def write_one(number: tuple[int, int]) -> int:
            buffer = self.buffer(*number)
            write(*number, buffer)
            return buffer.numel()

        with ThreadPoolExecutor(n_threads) as pool:
            try:
                for n_bytes in pool.map(write_one, self.numbers()):
                    after_expert(n_bytes)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def buffer(self, layer: int, expert: int) -> torch.Tensor:
        """Return an expert's bytes, a view of its layer's slab."""
        start = self._offsets[layer][expert]
        return self._slabs[layer][start : start + self.formats[layer][expert].n_bytes]

    def close(self) -> None:
        """Unpin and free the slabs."""
        self._unpin()
        self._slabs = []


class DiskStore(ExpertStore):
    """Experts that stay in their files; the last ones read are kept in host memory.

    Each expert's bytes are checked against a manifest of checksums when it is first read.
    """

    def __init__(
        self,
        formats: Formats,
        write: BufferWriter,
        manifest: ChecksumManifest,
        cache_bytes: int,
        on_close: Callable[[], object],
    ) -> None:
        """Read through `write`, keeping `cache_bytes` of buffers at most; `on_close` ends it."""
        super().__init__(formats)
        self._write = write
        self._manifest = manifest
        self._cache_bytes = cache_bytes
        self._on_close = on_close
        self._cached: OrderedDict[tuple[int, int], torch.Tensor] = OrderedDict()
        self._used_bytes = 0

    def buffer(self, layer: int, expert: int) -> torch.Tensor:
        """Return an expert's bytes, read from disk unless they were among the last.

        Raises:
            CheckpointError: the bytes are not those that were recorded.
        """
        key = (layer, expert)
        if key in self._cached:
            self._cached.move_to_end(key)
            return self._cached[key]
        n_bytes = self.formats[layer][expert].n_bytes
        while self._cached and self._used_bytes + n_bytes > self._cache_bytes:
            self._used_bytes -= self._cached.popitem(last=False)[1].numel()
        buffer = torch.empty(n_bytes, dtype=torch.uint8)
        self._write(layer, expert, buffer)
        self._manifest.check(layer, expert, buffer)
        if n_bytes <= self._cache_bytes:
            self._cached[key] = buffer
            self._used_bytes += n_bytes
        return buffer

    def close(self) -> None:
        """Forget the buffers that were kept, and close the files."""
        self._on_close()
        self._cached.clear()
        self._used_bytes = 0


def _pin(owner: HostStore, slabs: list[torch.Tensor]) -> weakref.finalize:
    """Register slabs with CUDA where they lie, and return what undoes it.

    torch's own pinned allocator rounds sizes up to a power of two, which may nearly double them.
    """
    finalizer = weakref.finalize(owner, _unpin, pinned := [])
    for slab in slabs:
        status = torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.numel(), 0)
        if int(status) != 0:
            finalizer()
            raise MemoryError(
                f"CUDA could not pin {slab.numel() / 2**30:.2f} GiB of host memory "
                f"({sum(s.numel() for s in slabs) / 2**30:.2f} GiB are needed in all): {status}. "
                "Free host memory, raise the limit of locked memory, or store the experts in a "
                "lower precision with expert_dtype='int4'."
            )
        pinned.append(slab)
    return finalizer


def _unpin(slabs: list[torch.Tensor]) -> None:
    if slabs:
        torch.cuda.synchronize()  # no copy may still read what is unpinned
    while slabs:
        torch.cuda.cudart().cudaHostUnregister(slabs.pop().data_ptr())
