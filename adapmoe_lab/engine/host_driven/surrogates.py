"""Surrogates at work: resident on the device, in place of the experts that tokens drop."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.records import Surrogates


class SurrogateOutputs:
    """A model's surrogates on the device; they are never moved again.

    Attributes:
        surrogates: the record they were made from, which also says what they compute.
    """

    def __init__(self, surrogates: Surrogates, device: torch.device, dtype: torch.dtype) -> None:
        """Bring surrogates to the device, in the precision the model computes in."""
        self.surrogates = surrogates
        self._down = [_on(device, dtype, down) for down in surrogates.down]  # [E, R, D]
        self._up = [_on(device, dtype, up.transpose(0, 2, 1)) for up in surrogates.up]  # [E, R, D]
        self._offset = [_on(device, dtype, row[:, None]) for row in surrogates.offset]  # [E, 1, D]

    def complete(
        self,
        layer: int,
        hidden: torch.Tensor,
        kept_output: torch.Tensor,
        routing: tuple[NDArray[np.int64], NDArray[np.float32]],
        keep: NDArray[np.bool_],
    ) -> torch.Tensor:
        """Return a layer's output [T, D] with its dropped experts compensated.

        All surrogates that some token needs are applied to all tokens at once, weighted by zero
        where they are not needed. The device is not waited for. Weights count as constants to a
        gradient.

        Args:
            layer: number of the MoE layer.
            hidden: the experts' input [T, D].
            kept_output: the weighted sum of the kept experts' outputs [T, D].
            routing: the router's choice, int64 [T, K] where E means no expert, and its own
                weights, float32 [T, K].
            keep: bool [T, K], what was run.
        """
        indices, weights = routing
        dropped = ~keep & (indices < self.surrogates.n_experts)
        if not dropped.any():
            return kept_output
        tokens, choices = np.nonzero(dropped)
        is_needed = np.zeros(self.surrogates.n_experts, dtype=bool)
        is_needed[indices[dropped]] = True
        needed = np.flatnonzero(is_needed).tolist()
        columns = np.cumsum(is_needed)[indices[dropped]] - 1
        coefficients = np.zeros((len(indices), len(needed) + 1), dtype=np.float32)
        coefficients[tokens, columns] = weights[tokens, choices]
        ratio = (weights * dropped).sum(axis=1) / (weights * keep).sum(axis=1)
        coefficients[:, -1] = 1 + self.surrogates.gain[layer] * ratio
        on_device = torch.from_numpy(coefficients).to(hidden.device, non_blocking=True)
        down, up, offset = (
            _rows(maps[layer], needed) for maps in (self._down, self._up, self._offset)
        )
        of_dropped = on_device[:, :-1].to(down.dtype)  # [T, n]
        inner = (hidden.to(down.dtype) @ down.T).unflatten(1, (len(needed), -1))
        inner = inner * of_dropped[:, :, None]  # [T, n, R]
        instead = torch.addmm(of_dropped @ offset, inner.flatten(1), up)
        return kept_output * on_device[:, -1:] + instead

    def complete_token(
        self,
        layer: int,
        hidden: torch.Tensor,
        kept_output: torch.Tensor,
        routing: tuple[torch.Tensor, torch.Tensor],
        dropped: torch.Tensor,
    ) -> torch.Tensor:
        """Return a layer's output [1, D] of one token, as `complete` does, from the device alone.

        Args:
            layer: number of the MoE layer.
            hidden: the experts' input [1, D].
            kept_output: the weighted sum of the kept experts' outputs [1, D].
            routing: the router's choice, int64 [K] where E means no expert, and the weights of
                those that are run, float32 [K], zero for the others.
            dropped: the weights of those that are skipped, float32 [K], zero for the others.
        """
        indices, kept = routing
        chosen = indices.clamp(max=self.surrogates.n_experts - 1)
        down, up, offset = (maps[layer][chosen] for maps in (self._down, self._up, self._offset))
        of_dropped = dropped.to(down.dtype)  # [K]
        inner = (down @ hidden[0].to(down.dtype)) * of_dropped[:, None]  # [K, R]
        instead = torch.addmm(
            of_dropped[None] @ offset[:, 0], inner.flatten()[None], up.flatten(0, 1)
        )
        total = kept.sum(0, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)  # [1]
        ratio = dropped.sum(0, keepdim=True) / total
        return kept_output * (1 + float(self.surrogates.gain[layer]) * ratio) + instead

    def of_each_choice(
        self,
        layer: int,
        hidden: torch.Tensor,
        nothing: torch.Tensor,
        routing: tuple[NDArray[np.int64], NDArray[np.float32]],
        keep: NDArray[np.bool_],
    ) -> torch.Tensor:
        """Return what would take the place of each choice alone, weighted, float32 [T, K, D].

        The arguments are those of `complete`. Completing `nothing`, an output of zeros [T, D], with
        one choice dropped leaves its surrogate alone.
        """
        each = []
        for k in range(keep.shape[1]):
            without = keep.copy()
            without[:, k] = False
            each.append(self.complete(layer, hidden, nothing, routing, without))
        return torch.stack(each, dim=1).float()


def _on(device: torch.device, dtype: torch.dtype, array: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).to(device, dtype).contiguous()


def _rows(maps: torch.Tensor, experts: list[int]) -> torch.Tensor:
    """Return the rows [n r, D] of some experts' maps [E, r, D]; of one or all without a copy."""
    if len(experts) == 1:
        return maps[experts[0]]
    if len(experts) == len(maps):
        return maps.flatten(0, 1)
    return torch.cat([maps[expert] for expert in experts])
