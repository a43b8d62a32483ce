"""Kernels of a captured step: who is resident, and products with experts wherever they lie.

Everything runs on one stream, in order: a slot is written by the programs of one expert, and read
no earlier than in a later step.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["layer"])
def lru_step_kernel(
    ids, owner, priority, clocks, hits, misses, n_slots,
    host_addresses, slot_addresses, reads, writes, columns, is_rehearsal, layer,
    n_experts: tl.constexpr, max_slots: tl.constexpr, slots_padded: tl.constexpr,
    top_k: tl.constexpr, top_k_padded: tl.constexpr,
):  # fmt: skip
    """Decide a one-token step of a layer by the step rules under LRU, in one program.

    Misses are given slots in ascending order of their ids: free slots first, then that of the
    smallest priority, ties to the lowest id; members of the step keep theirs. The rest is read from
    the host and written nowhere. In a rehearsal nothing changes.

    Args:
        ids: int64 [K], the router's choice; E means no expert.
        owner: int32 [L, S], the expert in every slot, -1 if it is free.
        priority: int64 [L, S], of the expert in every slot.
        clocks: int64 [L], steps before this one.
        hits: int64 [L], counted.
        misses: int64 [L], counted.
        n_slots: int32 [L], slots of each layer.
        host_addresses: int64 [L, E], where every expert lies in pinned memory.
        slot_addresses: int64 [L, S], where every slot lies.
        reads: int64 [K], filled with where each expert is read, ascending by id; 0 for no expert.
        writes: int64 [K], filled with the slot it is written through to, 0 for none.
        columns: int32 [K], filled with its place in `ids`.
        is_rehearsal: int32 [1], 1 to change nothing.
        layer: whose step.
        n_experts: experts of a layer.
        max_slots: most slots of a layer.
        slots_padded: max_slots, rounded up to a power of two.
        top_k: experts chosen.
        top_k_padded: top_k, rounded up to a power of two.
    """
    slot, k = tl.arange(0, slots_padded), tl.arange(0, top_k_padded)
    is_slot = slot < tl.load(n_slots + layer)
    counts = 1 - tl.load(is_rehearsal)
    now = tl.load(clocks + layer)
    own = tl.load(owner + layer * max_slots + slot, mask=is_slot, other=-2)
    prio = tl.load(priority + layer * max_slots + slot, mask=is_slot, other=0)
    chosen = tl.load(ids + k, mask=k < top_k, other=n_experts).to(tl.int32)
    for j in tl.static_range(top_k):
        prio = tl.where(own == tl.load(ids + j).to(tl.int32), 2 * now, prio)
    never = 1 << 62
    previous = -1
    n_hits, n_misses = 0, 0
    for rank in tl.static_range(top_k):
        expert = tl.min(tl.where(chosen > previous, chosen, n_experts), 0)
        previous = expert
        is_expert = expert < n_experts
        at = tl.max(tl.where(own == expert, slot, -1), 0)
        key = tl.where(prio < 2 * now, prio * (1 << 16) + own, never)
        key = tl.where(own == -1, slot.to(tl.int64) - slots_padded, key)
        key = tl.where(is_slot, key, never)
        least = tl.min(key, 0)
        victim = tl.min(tl.where(key == least, slot, slots_padded), 0)
        is_miss = is_expert & (at < 0)
        is_placed = is_miss & (least < never) & (counts > 0)
        resident = tl.load(slot_addresses + layer * max_slots + tl.maximum(at, 0))
        away = tl.load(host_addresses + layer * n_experts + tl.minimum(expert, n_experts - 1))
        place = tl.load(slot_addresses + layer * max_slots + tl.minimum(victim, max_slots - 1))
        tl.store(reads + rank, tl.where(is_expert, tl.where(at >= 0, resident, away), 0))
        tl.store(writes + rank, tl.where(is_placed, place, 0))
        tl.store(columns + rank, tl.min(tl.where(chosen == expert, k, top_k_padded - 1), 0))
        own = tl.where(is_placed & (slot == victim), expert, own)
        prio = tl.where(is_placed & (slot == victim), 2 * now + 1, prio)
        n_hits += (at >= 0).to(tl.int32)
        n_misses += is_miss.to(tl.int32)
    tl.store(owner + layer * max_slots + slot, own, mask=is_slot & (counts > 0))
    tl.store(priority + layer * max_slots + slot, prio, mask=is_slot & (counts > 0))
    tl.store(clocks + layer, now + counts)
    tl.store(hits + layer, tl.load(hits + layer) + n_hits * counts)
    tl.store(misses + layer, tl.load(misses + layer) + n_misses * counts)


@triton.jit(do_not_specialize=["offset", "x_stride"])
def served_product_kernel(
    reads, writes, columns, offset, x, x_stride, out, n_rows, n_columns,
    rows_at_once: tl.constexpr, columns_at_once: tl.constexpr,
):  # fmt: skip
    """Multiply a matrix [N, D] of each expert with its vector, wherever the expert lies.

    What is read of an expert that was given a slot is written through to it. Sums are float32.

    Args:
        reads: as `lru_step_kernel` fills it; so `writes` and `columns`.
        writes: see there.
        columns: see there; where an expert's vector and product go.
        offset: numbers before the matrix in an expert's buffer.
        x: bfloat16, vector of column k at k * x_stride.
        x_stride: 0 where all experts share one vector.
        out: bfloat16 [K, N].
        n_rows: rows of the matrix.
        n_columns: columns of the matrix.
        rows_at_once: rows of a program.
        columns_at_once: columns at once.
    """
    rank = tl.program_id(1)
    address = tl.load(reads + rank)
    if address != 0:
        target = tl.load(writes + rank)
        column = tl.load(columns + rank)
        # the hint must follow the cast, else every load is two bytes wide
        weights = tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 16) + offset
        copies = tl.multiple_of(target.to(tl.pointer_type(tl.bfloat16)), 16) + offset
        rows = tl.program_id(0) * rows_at_once + tl.arange(0, rows_at_once)
        total = tl.zeros([rows_at_once, columns_at_once], tl.float32)
        for begin in range(0, n_columns, columns_at_once):
            inner = begin + tl.arange(0, columns_at_once)
            is_there = (rows < n_rows)[:, None] & (inner < n_columns)[None, :]
            places = rows[:, None] * n_columns + inner[None, :]
            vector = tl.load(x + column * x_stride + inner, mask=inner < n_columns, other=0.0)
            part = tl.load(weights + places, mask=is_there, other=0.0)
            total += part.to(tl.float32) * vector.to(tl.float32)[None, :]
            if target != 0:
                tl.store(copies + places, part, mask=is_there)
        tl.store(out + column * n_rows + rows, tl.sum(total, 1).to(tl.bfloat16), mask=rows < n_rows)
