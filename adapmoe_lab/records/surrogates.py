"""What stands in for a skipped expert: a low-rank affine map per expert, and a gain per layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from adapmoe_lab.records.files import (
    HEADER,
    RecordError,
    check_version,
    frozen_array,
    written_atomically,
)
from adapmoe_lab.records.spec import MoESpec

KIND = "surrogates"
SCHEMA_VERSION = 1
MAPS = ("down", "up", "offset")
SCALARS = ("model_fingerprint", "method", "n_tokens", "texts", "gradient_weighted")


@dataclass(frozen=True, eq=False)
class Surrogates:
    """Stand-ins for the experts a token drops, resident on the device.

    With kept experts A, dropped experts B, router weights w and W their sums, a layer gives

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
            told = ", ".join(f"{n} of {name}" for name, n in counts.items())
            raise RecordError(f"Surrogates need every array once per layer; got {told}.")
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

    @classmethod
    def scaling(cls, spec: MoESpec, gain: ArrayLike) -> Surrogates:
        """Stand in with nothing but scaled kept experts, by one gain or one per layer [L]."""
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

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of their saved form, in hex."""
        return sha256(self.to_bytes()).hexdigest()

    def fingerprint(self) -> str:
        """Identify them by their values and how they were made."""
        return self.sha256[:16]

    def to_bytes(self) -> bytes:
        """Return them as the content of a safetensors file."""
        tensors: dict[str, NDArray] = {"gain": self.gain}
        for name in MAPS:
            for layer, array in enumerate(getattr(self, name)):
                tensors[f"layers.{layer}.{name}"] = array
        scalars = {name: getattr(self, name) for name in SCALARS}
        header = {"kind": KIND, "schema_version": SCHEMA_VERSION, **scalars}
        return save(tensors, metadata={HEADER: json.dumps(header, sort_keys=True)})

    def save(self, path: str | Path) -> Path:
        """Write them as one safetensors file, whole or not at all, and return its path."""
        path = Path(path)
        with written_atomically(path) as file:
            file.write(self.to_bytes())
        return path

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
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"No {KIND} at {path}.")
        with path.open("rb") as content:
            found = file_digest(content, "sha256").hexdigest()
        if expected_sha256 is not None and found != expected_sha256:
            raise RecordError(
                f"{path} has the SHA-256 {found[:12]}, expected {expected_sha256[:12]}: it changed "
                "since it was saved, or is damaged. Restore it, or fit the surrogates again."
            )
        try:
            with safe_open(path, "np") as file:
                header = json.loads((file.metadata() or {})[HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            check_version(header, KIND, SCHEMA_VERSION, path)
            layers = range(len(tensors["gain"]))
            maps = {name: [tensors[f"layers.{i}.{name}"] for i in layers] for name in MAPS}
            scalars = {name: header[name] for name in SCALARS}
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise RecordError(
                f"{path} does not hold whole {KIND} ({error!r}); fit them again."
            ) from error
        return cls(gain=tensors["gain"], **maps, **scalars)
