"""Surrogates of skipped experts: a low-rank affine map per expert, and a gain per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapmoe_lab.records.files import IDENTIFYING, RecordError, frozen_array, known_values
from adapmoe_lab.records.spec import MoESpec
from adapmoe_lab.records.tensors import TensorRecord, loaded_tensors, tensor_bytes

KIND = "surrogates"
SCHEMA_VERSION = 1
MAPS = ("down", "up", "offset")
SCALARS = ("model_fingerprint", "method", "n_tokens", "texts", "gradient_weighted")


@dataclass(frozen=True, eq=False)
class Surrogates(TensorRecord):
    """Surrogates of the experts that a token skips, resident on the device.

    With kept experts A, skipped experts B, router weights w and W their sums, a layer gives

        (1 + gain * W_B / W_A) * sum_A w_k f_k(x)  +  sum_B w_k s_k(x),
        s_e(x) = offset_e + up_e @ (down_e @ x).

    A gain of 0 leaves the kept weights as they are, 1 renormalises them; at rank 0 only the offset
    is left, which is then the expert's mean output.

    Attributes:
        model_fingerprint: the model they were fitted to.
        down: per layer, float32 [E, R_l, D]; the rank R_l may differ from layer to layer.
        up: per layer, float32 [E, D, R_l].
        offset: per layer, float32 [E, D].
        gain: float64 [L].
        method: how they were made.
        n_tokens: tokens they were fitted on.
        texts: digest of those tokens.
        gradient_weighted: whether errors counted by what they do to the loss.
    """

    model_fingerprint: str
    down: Sequence[NDArray[np.float32]]
    up: Sequence[NDArray[np.float32]]
    offset: Sequence[NDArray[np.float32]]
    gain: NDArray[np.float64]
    method: str
    n_tokens: int = 0
    texts: str = ""
    gradient_weighted: bool = False

    def __post_init__(self) -> None:
        """Freeze the arrays and check that their shapes agree."""
        counts = {name: len(getattr(self, name)) for name in (*MAPS, "gain")}
        if len(set(counts.values())) != 1 or not counts["gain"]:
            counted = ", ".join(f"{n} of {name}" for name, n in counts.items())
            raise RecordError(f"Surrogates need every array once per layer; got {counted}.")
        gain = frozen_array("gain", self.gain, np.float64, (None,))
        first = frozen_array("offset of layer 0", self.offset[0], np.float32, (None, None))
        n_experts, hidden_size = first.shape
        frozen: dict[str, list[NDArray]] = {name: [] for name in MAPS}
        for layer, down in enumerate(self.down):
            rank = np.shape(down)[1] if np.ndim(down) == 3 else None
            shapes = {
                "down": (n_experts, rank, hidden_size),
                "up": (n_experts, hidden_size, rank),
                "offset": (n_experts, hidden_size),
            }
            for name, shape in shapes.items():
                label = f"{name} of layer {layer}"
                array = frozen_array(label, getattr(self, name)[layer], np.float32, shape)
                frozen[name].append(array)
        if not all(np.isfinite(a).all() for a in (gain, *(a for f in frozen.values() for a in f))):
            raise RecordError("Surrogates must be finite; fit them again.")
        object.__setattr__(self, "gain", gain)
        for name, arrays in frozen.items():
            object.__setattr__(self, name, tuple(arrays))

    def check_model(self, spec: MoESpec) -> None:
        """Raise RecordError unless they were fitted to this model's weights."""
        spec.check_made_for(
            self.model_fingerprint, "The surrogates were fitted to a model", "Fit surrogates to it."
        )

    @classmethod
    def scaling(cls, spec: MoESpec, gain: ArrayLike) -> Surrogates:
        """Return what only scales the kept experts, by one gain or one per layer [L]."""
        layers, n_experts, width = range(spec.n_layers), spec.n_experts, spec.hidden_size
        return cls(
            model_fingerprint=spec.fingerprint(),
            down=[np.zeros((n_experts, 0, width), np.float32)] * len(layers),
            up=[np.zeros((n_experts, width, 0), np.float32)] * len(layers),
            offset=[np.zeros((n_experts, width), np.float32)] * len(layers),
            gain=np.broadcast_to(np.asarray(gain, dtype=np.float64), (len(layers),)),
            method="scaling",
        )

    @property
    def n_layers(self) -> int:
        """L, the number of layers."""
        return len(self.gain)

    @property
    def n_experts(self) -> int:
        """E, the experts of a layer."""
        return self.offset[0].shape[0]

    @property
    def hidden_size(self) -> int:
        """D, the width of an expert's input and output."""
        return self.offset[0].shape[1]

    @property
    def ranks(self) -> tuple[int, ...]:
        """R_l of every layer."""
        return tuple(down.shape[1] for down in self.down)

    def n_bytes(self, item_bytes: int) -> int:
        """Return what they take on the device in numbers of `item_bytes` bytes each."""
        numbers_each = [(2 * rank + 1) * self.hidden_size for rank in self.ranks]
        return self.n_experts * sum(numbers_each) * item_bytes

    def to_bytes(self) -> bytes:
        """Return them as the content of a safetensors file."""
        tensors: dict[str, NDArray] = {"gain": self.gain}
        for name in MAPS:
            for layer, array in enumerate(getattr(self, name)):
                tensors[f"layers.{layer}.{name}"] = array
        scalars = {name: getattr(self, name) for name in SCALARS}
        return tensor_bytes(KIND, SCHEMA_VERSION, scalars, tensors)

    @classmethod
    def load(cls, path: str | Path, expected_sha256: str | None = None) -> Surrogates:
        """Read saved surrogates.

        Args:
            path: the file.
            expected_sha256: what the file's SHA-256 must be, if it is known.

        Raises:
            FileNotFoundError: there is no such file.
            RecordError: damaged, changed, or of another kind or version.
        """
        with loaded_tensors(Path(path), KIND, SCHEMA_VERSION, expected_sha256) as (header, tensors):
            header = known_values(header, str(path), (*IDENTIFYING, *SCALARS))
            layers = range(len(tensors["gain"]))
            placed = {name: [f"layers.{i}.{name}" for i in layers] for name in MAPS}
            known_values(tensors, str(path), ("gain", *chain(*placed.values())))
            maps = {name: [tensors[place] for place in places] for name, places in placed.items()}
            scalars = {name: header[name] for name in SCALARS}
        return cls(gain=tensors["gain"], **maps, **scalars)
