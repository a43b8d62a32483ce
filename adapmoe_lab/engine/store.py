"""All experts in host memory, one contiguous buffer each."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch

Views = dict[str, torch.Tensor]


class ExpertStore:
    """The experts of every layer, each a flat row of its layer's slab.

    A slab [E, n] holds a layer; on CUDA machines it is pinned, so that copies are asynchronous.
    """

    def __init__(self, layers: Iterable[Views], pinned: bool) -> None:
        """Lay out fused expert tensors [E, ...], one mapping per layer."""
        self._shapes: list[dict[str, torch.Size]] = []
        self._slabs: list[torch.Tensor] = []
        for tensors in layers:
            self._shapes.append({name: t.shape[1:] for name, t in tensors.items()})
            rows = [t.reshape(t.shape[0], -1) for t in tensors.values()]
            slab = torch.cat(rows, dim=1).cpu()
            self._slabs.append(slab.pin_memory() if pinned else slab)

    @property
    def n_layers(self) -> int:
        """L, the number of layers."""
        return len(self._slabs)

    @property
    def n_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(slab.numel() * slab.element_size() for slab in self._slabs)

    def slab(self, layer: int) -> torch.Tensor:
        """Return a layer's experts as rows [E, n]."""
        return self._slabs[layer]

    def views(self, layer: int, row: torch.Tensor) -> Views:
        """Return the named tensors of one expert that lie in a flat row [n]."""
        shapes = self._shapes[layer]
        pieces = row.split([prod(shape) for shape in shapes.values()])
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        }

    def fused(self, layer: int) -> Views:
        """Return a layer's tensors [E, ...] as copies, the way transformers holds them."""
        slab, shapes = self._slabs[layer], self._shapes[layer]
        pieces = slab.split([prod(shape) for shape in shapes.values()], dim=1)
        return {
            name: piece.reshape(slab.shape[0], *shape).clone()
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        }
