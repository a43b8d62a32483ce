"""Surrogates at work: resident on the device, in place of the experts that tokens drop."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from adapmoe_lab.records import Surrogates


class Compensation:
    """A model's surrogates on the device; they are never moved again.

    Attributes:
        surrogates: the record they were made from, which also says what they compute.
    """

    def __init__(self, surrogates: Surrogates, device: torch.device, dtype: torch.dtype) -> None:
        """Bring surrogates to the device, in the precision the model computes in."""
        self.surrogates = surrogates
        self._down = [_on(device, dtype, down) for down in surrogates.down]  # [E, R, D]
        # The offset is one more row of `up`, multiplied by one: [E, R + 1, D].
        self._up = [
            _on(device, dtype, np.concatenate([up, offset[:, :, None]], axis=2).transpose(0, 2, 1))
            for up, offset in zip(surrogates.up, surrogates.offset, strict=True)
        ]

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
        experts, columns = np.unique(indices[dropped], return_inverse=True)
        n_tokens, n_needed = len(indices), len(experts)
        coefficients = np.zeros((n_tokens, n_needed + 1), dtype=np.float32)
        coefficients[tokens, columns] = weights[tokens, choices]
        ratio = (weights * dropped).sum(axis=1) / (weights * keep).sum(axis=1)
        coefficients[:, n_needed] = 1 + self.surrogates.gain[layer] * ratio
        on_device = torch.from_numpy(coefficients).to(hidden.device, non_blocking=True)
        down, up = (_rows(maps[layer], experts) for maps in (self._down, self._up))
        inner = (hidden @ down.T).unflatten(1, (n_needed, -1))
        inner = pad(inner, (0, 1), value=1.0) * on_device[:, :n_needed, None].to(hidden.dtype)
        stand_ins = inner.flatten(1) @ up  # [T, n (R + 1)] @ [n (R + 1), D]
        return kept_output * on_device[:, n_needed:] + stand_ins

    def stand_ins(
        self, layer: int, hidden: torch.Tensor, indices: NDArray[np.int64], weights: torch.Tensor
    ) -> torch.Tensor:
        """Return what would stand in for each chosen expert [T, K, D], weighted by [T, K]."""
        chosen = torch.from_numpy(np.minimum(indices, self.surrogates.n_experts - 1))
        each = []
        for experts in chosen.to(hidden.device).unbind(1):
            inner = torch.einsum("trd,td->tr", self._down[layer][experts], hidden)
            each.append(
                torch.einsum("tr,trd->td", pad(inner, (0, 1), value=1.0), self._up[layer][experts])
            )
        return torch.stack(each, dim=1) * weights.unsqueeze(-1)


def _on(device: torch.device, dtype: torch.dtype, array: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).to(device, dtype).contiguous()


def _rows(maps: torch.Tensor, experts: NDArray[np.int64]) -> torch.Tensor:
    """Return the rows [n r, D] of some experts' maps [E, r, D]; all of them without a copy."""
    if len(experts) == len(maps):
        return maps.flatten(0, 1)
    return torch.cat([maps[expert] for expert in experts])
