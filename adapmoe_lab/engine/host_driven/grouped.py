"""The products of many tokens with a layer's experts, a group of experts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from adapmoe_lab.engine.device import runs_kernels
from adapmoe_lab.engine.host_driven.combine import LayerRun
from adapmoe_lab.engine.host_driven.expert_sources import CachedExperts
from adapmoe_lab.engine.store.expert_store import ExpertStore
from adapmoe_lab.engine.transfer.clock import Clock, VirtualClock
from adapmoe_lab.models.experts import activate
from adapmoe_lab.records import ExpertFormat
from adapmoe_lab.records.expert_format import Field

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""What experts may be stored in."""

MATRICES = (("gate_up_proj", "down_proj"), ("up_proj", "down_proj"))
"""What an expert may consist of."""

MOST_INNER_BYTES = 2**26
"""First products that are held at once, unless one expert has more; it bounds activations."""


@dataclass(frozen=True)
class Tile:
    """What a program of the kernel takes at once.

    Attributes:
        tokens: rows of activations.
        rows: rows of a matrix.
        columns: columns of both at a time.
        n_warps: its warps.
        n_stages: loads under way at a time.
    """

    tokens: int
    rows: int
    columns: int
    n_warps: int
    n_stages: int


TILES = (Tile(16, 64, 128, 4, 4), Tile(32, 64, 128, 4, 3), Tile(64, 128, 64, 4, 3))
"""For few tokens of an expert, and for more; each fits the shared memory of any GPU."""


def tile_for(n_tokens: int, top_k: int, n_experts: int) -> Tile:
    """Return the tile for a number of tokens; who chose what, and what is resident, is no part."""
    mean = n_tokens * top_k / n_experts
    return next((tile for tile in TILES if mean <= tile.tokens), TILES[-1])


@dataclass(frozen=True, eq=False)
class GroupTable:
    """Which rows are multiplied with which expert.

    Attributes:
        numbers: as the kernel reads it, int64.
        rows_at: where the rows begin in it.
        first_tiles: int64 [n + 1], the first tile of each expert, and how many there are.
        first_rows: int64 [n + 1], the first row of each, and how many there are.
    """

    numbers: NDArray[np.int64]
    rows_at: int
    first_tiles: NDArray[np.int64]
    first_rows: NDArray[np.int64]


def group_table(
    indices: NDArray[np.int64],
    keep: NDArray[np.bool_],
    experts: Sequence[int],
    addresses: Sequence[int],
    tokens_at_once: int,
) -> GroupTable:
    """Sort what is run by expert, and cut the rows of each into tiles.

    Args:
        indices: the router's choice, int64 [T, K].
        keep: bool [T, K], which of them are run.
        experts: all that are run [n], in the order that their rows are to have.
        addresses: of each on the device.
        tokens_at_once: the most rows of a tile.
    """
    places = np.flatnonzero(keep)
    chosen = indices.ravel()[places]
    rank_of = np.zeros(int(chosen.max(initial=0)) + 1, dtype=np.int64)
    rank_of[np.asarray(experts, dtype=np.int64)] = np.arange(len(experts))
    ranks = rank_of[chosen]
    first_rows = _begins(np.bincount(ranks, minlength=len(experts)))
    first_tiles = _begins(-(-np.diff(first_rows) // tokens_at_once))
    of_tile = np.repeat(np.arange(len(experts)), np.diff(first_tiles))
    within = np.arange(len(of_tile)) - first_tiles[of_tile]
    tiles = np.empty((len(of_tile), 3), dtype=np.int64)
    tiles[:, 0] = np.asarray(addresses, dtype=np.int64)[of_tile]
    tiles[:, 1] = first_rows[of_tile] + tokens_at_once * within
    tiles[:, 2] = first_rows[of_tile + 1]
    rows = places[np.argsort(ranks, kind="stable")]
    return GroupTable(np.concatenate([tiles.ravel(), rows]), tiles.size, first_tiles, first_rows)


def _begins(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where each of some runs begins, and where the last ends."""
    return np.concatenate([[0], counts.cumsum()])


class GroupedProducts:
    """Runs the experts of many tokens group by group, in the order that they arrive."""

    def __init__(self, store: ExpertStore, device: torch.device, clock: Clock) -> None:
        """Find out which layers of a store can be run so on a device.

        On a virtual clock none is: experts take their time on it one by one.
        """
        is_able = runs_kernels(device) and not isinstance(clock, VirtualClock)
        found = enumerate(map(_fields, store.formats) if is_able else ())
        self._fields = {layer: fields for layer, fields in found if fields is not None}

    def serves(self, run: LayerRun, hidden: torch.Tensor) -> bool:
        """Whether a layer's experts can be run so for hidden states [T, D]; one token is not."""
        return (
            len(hidden) > 1
            and run.layer in self._fields
            and hidden.dtype == DTYPES[self._fields[run.layer][0].precision.name]
            and not getattr(run.module, "has_post_expert_norm", False)
        )

    def contributions(
        self, run: LayerRun, source: CachedExperts, hidden: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted expert outputs [T, K, D], zero where nothing is run."""
        fields = self._fields[run.layer]
        tile = tile_for(*run.indices.shape, source.n_experts(run.layer))
        needed = np.unique(run.indices[run.keep]).tolist()
        with source.fetching(run.layer, needed, hidden) as fetch, torch.cuda.device_of(hidden):
            table = group_table(run.indices, run.keep, fetch.experts, fetch.addresses, tile.tokens)
            layer = _LayerProducts(run, fields, tile, table, hidden.contiguous(), weights)
            n_run = 0
            for group in fetch.arrivals:
                layer.run_group(n_run, n_run + len(group))
                n_run += len(group)
        return layer.parts


class _LayerProducts:
    """The products of one layer under way."""

    def __init__(
        self,
        run: LayerRun,
        fields: tuple[Field, Field],
        tile: Tile,
        table: GroupTable,
        hidden: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        """Bring the table to the device."""
        self._run, self._tile, self._table = run, tile, table
        self._first, self._last = fields
        self._hidden, self._weights = hidden, weights.contiguous()
        self._numbers = torch.from_numpy(table.numbers).to(hidden.device, non_blocking=True)
        inner_bytes = self._first.matrix_shape[0] * hidden.element_size()
        self._most_rows = max(1, MOST_INNER_BYTES // inner_bytes)
        self.parts = run.no_contributions(hidden, weights)

    def run_group(self, begin: int, end: int) -> None:
        """Run some of the experts, by their places in the table."""
        first_rows = self._table.first_rows
        while begin < end:
            most = first_rows[begin] + self._most_rows
            fitting = int(np.searchsorted(first_rows, most, side="right")) - 1
            part_end = min(max(fitting, begin + 1), end)
            self._run_part(begin, part_end)
            begin = part_end

    def _run_part(self, begin: int, end: int) -> None:
        """Run experts whose first products are held at once."""
        first_row, last_row = self._table.first_rows[[begin, end]].tolist()
        tiles = self._table.first_tiles[[begin, end]].tolist()
        inner = self._hidden.new_empty((last_row - first_row, self._first.matrix_shape[0]))
        self._product(tiles, first_row, self._first, self._hidden, inner, is_weighted=False)
        inner = activate(self._run.module, inner).contiguous()
        self._product(tiles, first_row, self._last, inner, self.parts, is_weighted=True)

    def _product(
        self,
        tiles: Sequence[int],
        first_row: int,
        field: Field,
        x: torch.Tensor,
        out: torch.Tensor,
        is_weighted: bool,
    ) -> None:
        import triton

        from adapmoe_lab.engine.host_driven.grouped_kernel import grouped_product_kernel

        tile, (n_rows, n_columns) = self._tile, field.matrix_shape
        grouped_product_kernel[(tiles[1] - tiles[0], triton.cdiv(n_rows, tile.rows))](
            self._numbers, self._table.rows_at, tiles[0], first_row,
            field.offset // x.element_size(), x, self._weights, out, n_rows, n_columns,
            self._run.indices.shape[1], is_weighted, tile.tokens, tile.rows, tile.columns,
            num_warps=tile.n_warps, num_stages=tile.n_stages,
        )  # fmt: skip


def _fields(experts: Sequence[ExpertFormat]) -> tuple[Field, Field] | None:
    """Return the two matrices of a layer's experts; None if the kernel cannot multiply by them."""
    fields = experts[0].fields
    if any(expert != experts[0] for expert in experts):
        return None
    if tuple(field.name for field in fields) not in MATRICES:
        return None
    if any(field.transposed or field.precision.name not in DTYPES for field in fields):
        return None
    return fields[0], fields[1]
