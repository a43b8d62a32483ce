"""What was fitted to predict routing: maps from activations, and a table of tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from adapmoe_lab.records.files import IDENTIFYING, RecordError, frozen_array, known_values
from adapmoe_lab.records.spec import MoESpec
from adapmoe_lab.records.tensors import TensorRecord, loaded_tensors, tensor_bytes

KIND = "predictors"
SCHEMA_VERSION = 1
SCALARS = ("model_fingerprint", "n_tokens", "texts")
TABLES = ("table_tokens", "token_table", "last_hidden")
RIDGE = "ridge."


@dataclass(frozen=True, eq=False)
class Predictors(TensorRecord):
    """Fitted predictors of a model with L layers of E experts and D channels.

    The last row of a map is its constant.

    Attributes:
        model_fingerprint: the model they were fitted to.
        ridge: by distance d, float32 [L, D+1, E]: from the experts' input of layer l - d to the
            router logits of layer l; zero where there is no such layer.
        table_tokens: int32 [N], ascending: the token ids that were seen.
        token_table: float32 [N, E], the router scores of layer 0 to expect of each.
        last_hidden: float32 [D+1, E], from the last hidden state of a token to the router logits
            of layer 0 for the next.
        n_tokens: tokens they were fitted on.
        texts: digest of those tokens.
    """

    model_fingerprint: str
    ridge: Mapping[int, NDArray[np.float32]]
    table_tokens: NDArray[np.int32]
    token_table: NDArray[np.float32]
    last_hidden: NDArray[np.float32]
    n_tokens: int
    texts: str = ""

    def __post_init__(self) -> None:
        """Freeze the arrays and check that their shapes agree."""
        last = frozen_array("last_hidden", self.last_hidden, np.float32, (None, None))
        tokens = frozen_array("table_tokens", self.table_tokens, np.int32, (None,))
        table = frozen_array(
            "token_table", self.token_table, np.float32, (len(tokens), last.shape[1])
        )
        if (np.diff(tokens) <= 0).any():
            raise RecordError("table_tokens must ascend, every token once.")
        n_layers = None
        ridge = {}
        for distance, weights in sorted(self.ridge.items()):
            name = f"ridge at distance {distance}"
            if distance < 1:
                raise RecordError(f"{name} looks at no earlier layer; distances start at 1.")
            ridge[distance] = frozen_array(name, weights, np.float32, (n_layers, *last.shape))
            n_layers = len(ridge[distance])
        if not all(np.isfinite(array).all() for array in (last, table, *ridge.values())):
            raise RecordError("Predictors must be finite; fit them again.")
        object.__setattr__(self, "last_hidden", last)
        object.__setattr__(self, "table_tokens", tokens)
        object.__setattr__(self, "token_table", table)
        object.__setattr__(self, "ridge", MappingProxyType(ridge))

    @property
    def n_bytes(self) -> int:
        """What they take on the device: four bytes a number, layers without a source left out."""
        of_ridge = sum(weights[distance:].size for distance, weights in self.ridge.items())
        others = (self.table_tokens, self.token_table, self.last_hidden)
        return 4 * (of_ridge + sum(array.size for array in others))

    def check_model(self, spec: MoESpec) -> None:
        """Raise RecordError unless they were fitted to this model's weights."""
        spec.check_made_for(
            self.model_fingerprint, "The predictors were fitted to a model", "Fit predictors to it."
        )

    def to_bytes(self) -> bytes:
        """Return them as the content of a safetensors file."""
        tensors = {
            **{name: getattr(self, name) for name in TABLES},
            **{f"{RIDGE}{distance}": weights for distance, weights in self.ridge.items()},
        }
        scalars = {name: getattr(self, name) for name in SCALARS}
        return tensor_bytes(KIND, SCHEMA_VERSION, scalars, tensors)

    @classmethod
    def load(cls, path: str | Path, expected_sha256: str | None = None) -> Predictors:
        """Read saved predictors.

        Args:
            path: the file.
            expected_sha256: what the file's SHA-256 must be, if it is known.

        Raises:
            FileNotFoundError: there is no such file.
            RecordError: damaged, changed, or of another kind or version.
        """
        with loaded_tensors(Path(path), KIND, SCHEMA_VERSION, expected_sha256) as (header, tensors):
            header = known_values(header, str(path), (*IDENTIFYING, *SCALARS))
            ridge = {
                name: int(name.removeprefix(RIDGE))
                for name in tensors
                if re.fullmatch(rf"{re.escape(RIDGE)}\d+", name)
            }
            tensors = known_values(tensors, str(path), (*TABLES, *ridge))
            return cls(
                ridge={distance: tensors[name] for name, distance in ridge.items()},
                **{name: tensors[name] for name in TABLES},
                **{name: header[name] for name in SCALARS},
            )
