"""The kernel that decides a one-token step of a layer: what is skipped, who is where, who leaves.

One program, since the next expert to leave depends on the last. It is made of the eviction policy's
own functions, so that a policy is written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adapmoe_lab.engine.graph.device_functions import device_function
from adapmoe_lab.policies.eviction.fixed_point import SCORE_BITS, mean_score, token_weight
from adapmoe_lab.policies.eviction.policy import PROTECTED, Use
from adapmoe_lab.records.gating_table import CUMULATIVE_SHARE, SHORTFALL

QUANTITIES = {None: 0, CUMULATIVE_SHARE: 1, SHORTFALL: 2}
"""How the kernel knows what cuts are on; None where nothing is skipped."""

_UNGATED, _SHORTFALL = tl.constexpr(QUANTITIES[None]), tl.constexpr(QUANTITIES[SHORTFALL])
_NEVER = tl.constexpr(PROTECTED)
_SCORE_UNITS, _ONE_TOKEN = tl.constexpr(2.0**SCORE_BITS), tl.constexpr(token_weight(1))
_mean_score = device_function(mean_score)


@triton.jit
def fixed_score(score):
    """Return a router score as a trace keeps it, in units of 2^-24; see `FIXED_SCORES`."""
    score = tl.where(score == score, score.to(tl.float32), 0.0)
    rounded = tl.minimum(tl.maximum(score, 0.0), 1.0).to(tl.float16)
    return (rounded.to(tl.float32) * _SCORE_UNITS).to(tl.int64)


@triton.jit
def sorted_ranks(numbers, k):
    """Return the place of each of some numbers [K] in their ascending order, ties by column."""
    is_ahead = (numbers[None, :] < numbers[:, None]) | (
        (numbers[None, :] == numbers[:, None]) & (k[None, :] < k[:, None])
    )
    return tl.sum(is_ahead.to(tl.int32), 1)


@triton.jit
def kept_by_cuts(weights, cuts, quantity, k, top_k: tl.constexpr):
    """Return which of a token's experts are kept, bool [K], as `keep_by_cuts` does to the bit."""
    keep = k < top_k
    if quantity != _UNGATED:
        total = tl.load(weights).to(tl.float32)
        for column in tl.static_range(1, top_k):
            total += tl.load(weights + column).to(tl.float32)
        share = tl.load(weights + k, mask=keep, other=0.0).to(tl.float32)
        share = tl.where(keep, tl.div_rn(share, total), -1.0)
        rank = sorted_ranks(-share, k)
        best = tl.max(share, 0)
        together, is_reached, n_best = best, best < -1.0, 1
        for n_kept in tl.static_range(1, top_k):
            following = tl.sum(tl.where(rank == n_kept, share, 0.0), 0)
            shortfall = 1.0 - tl.div_rn(following, best)
            value = tl.where(quantity == _SHORTFALL, shortfall, together)
            is_reached = is_reached | (value >= tl.load(cuts + n_kept - 1))
            n_best = tl.where(is_reached, n_best, n_kept + 1)
            together += following
        keep = rank < n_best
    return keep


@triton.jit
def gated_weight(weight, keep, is_renormalised):
    """Return what outputs are weighted by [K], zero for a dropped one; see `gated_weights`."""
    if is_renormalised != 0:
        weight *= tl.div_rn(tl.sum(weight, 0), tl.sum(tl.where(keep, weight, 0.0), 0))
    return tl.where(keep, weight, 0.0)


@triton.jit
def priorities_after(
    priority, scores, e, n_experts, is_hit, is_member, now, n_layers: tl.constexpr,
    after_use: tl.constexpr, on_new_step: tl.constexpr, on_scores: tl.constexpr,
):  # fmt: skip
    """Return a layer's priorities [E] as the policy changes them in a step."""
    if on_new_step is not None:
        priority = on_new_step(priority)
    if on_scores is not None:
        score = fixed_score(tl.load(scores + e, mask=e < n_experts, other=0.0))
        priority = on_scores(priority, _mean_score(score, _ONE_TOKEN))
    used, _ = after_use(priority, 0, Use(is_hit.to(tl.int64), 0, now, n_layers, now // n_layers))
    return tl.where(is_member, used, priority)


@triton.jit
def keys_elsewhere(
    slot_of, priority, is_pinned, x, layer, n_experts: tl.constexpr, n_all: tl.constexpr
):
    """Return by what the experts of a pool's other layers leave, [L E]; the others never do."""
    is_other = (x < n_all) & (x // n_experts != layer)
    slot = tl.load(slot_of + x, mask=is_other, other=-1)
    pinned = tl.load(is_pinned + x, mask=is_other, other=1)
    key = tl.load(priority + x, mask=is_other, other=0)
    return tl.where((slot >= 0) & (pinned == 0), key, _NEVER)


@triton.jit(do_not_specialize=["layer"])
def step_kernel(
    ids, weights, scores, cuts, gating,
    slot_of, priority, is_pinned, clocks, free_slots, n_free, hits, misses, skipped,
    host_addresses, slot_addresses, reads, writes, columns, coefficients, dropped, is_rehearsal,
    layer,
    n_layers: tl.constexpr, n_experts: tl.constexpr, n_places: tl.constexpr, top_k: tl.constexpr,
    experts_padded: tl.constexpr, all_padded: tl.constexpr, top_k_padded: tl.constexpr,
    after_use: tl.constexpr, on_new_step: tl.constexpr, on_scores: tl.constexpr,
    code: tl.constexpr,
):  # fmt: skip
    """Decide a one-token step of a layer by the step rules, in one program.

    Misses are given slots in ascending order of their ids: free slots first, then that of the
    smallest priority, ties to the lowest layer and id; members of the step keep theirs. The rest is
    read from the host and written nowhere. In a rehearsal nothing changes.

    Args:
        ids: int64 [K], the router's choice; E means no expert.
        weights: its weights [K].
        scores: the router's scores [E], for policies that read them.
        cuts: float32 [L, K-1], of the gating.
        gating: int32 [2], what cuts are on, see `QUANTITIES`, and 1 to renormalise weights.
        slot_of: int32 [L, E], the slot of every expert in its pool, -1 if it is not resident.
        priority: int64 [L, E], of every expert.
        is_pinned: int32 [L, E], 1 for an expert that never leaves.
        clocks: int64 [P], steps of every pool before this one.
        free_slots: int32 [P, S], the slots that are free, those taken first last.
        n_free: int32 [P], how many are.
        hits: int64 [L], counted; so `misses` and `skipped`, choices that were not run.
        misses: see there.
        skipped: see there.
        host_addresses: int64 [L, E], where every expert lies in pinned memory.
        slot_addresses: int64 [P, S], where every slot lies.
        reads: int64 [K], filled with where each expert is read, ascending by id; 0 for no expert.
        writes: int64 [K], filled with the slot it is written through to, 0 for none.
        columns: int32 [K], filled with its place in `ids`.
        coefficients: float32 [K], filled with what outputs are weighted by, zero for no expert.
        dropped: float32 [K], filled with the weights of experts that are skipped, else zero.
        is_rehearsal: int32 [1], 1 to change nothing.
        layer: whose step.
        n_layers: layers of a pool, 1 or L.
        n_experts: E.
        n_places: S, most slots of a pool.
        top_k: K.
        experts_padded: E, rounded up to a power of two.
        all_padded: experts of a pool of all layers, rounded up so.
        top_k_padded: K, rounded up so.
        after_use: the policy's, as a device function.
        on_new_step: the same; None where it has none.
        on_scores: the same.
        code: what identifies the policy's functions, for a cache of compiled kernels.
    """
    # Long: one program whose every value the last stores need.
    is_shared: tl.constexpr = n_layers > 1
    k, e = tl.arange(0, top_k_padded), tl.arange(0, experts_padded)
    first, pool = layer * n_experts, 0 if is_shared else layer
    counts, now = 1 - tl.load(is_rehearsal), tl.load(clocks + pool)
    free_before = tl.load(n_free + pool)
    chosen = tl.load(ids + k, mask=k < top_k, other=n_experts).to(tl.int32)
    keep = kept_by_cuts(weights, cuts + layer * (top_k - 1), tl.load(gating), k, top_k)
    is_skipped = ~keep & (chosen < n_experts)
    keep &= chosen < n_experts
    chosen = tl.where(keep, chosen, n_experts)

    slot = tl.load(slot_of + first + e, mask=e < n_experts, other=-1)
    prio = tl.load(priority + first + e, mask=e < n_experts, other=0)
    pinned = tl.load(is_pinned + first + e, mask=e < n_experts, other=1)
    is_member = (tl.sum((chosen[None, :] == e[:, None]).to(tl.int32), 1) > 0) & (e < n_experts)
    is_hit = is_member & (slot >= 0)
    prio = priorities_after(
        prio, scores, e, n_experts, is_hit, is_member, now, n_layers, after_use, on_new_step,
        on_scores,
    )  # fmt: skip
    n_hits = tl.sum(is_hit.to(tl.int32), 0)
    n_misses = tl.sum(is_member.to(tl.int32), 0) - n_hits

    place = tl.load(slot_of + first + chosen, mask=keep, other=-1)
    written, n_left = tl.full([top_k_padded], -1, tl.int32), free_before
    if n_misses > 0:
        own, x = first + e, tl.arange(0, all_padded)
        key = tl.where((slot >= 0) & ~is_member & (pinned == 0), prio, _NEVER)
        if is_shared:
            n_all: tl.constexpr = n_layers * n_experts
            other_key = keys_elsewhere(slot_of, priority, is_pinned, x, layer, n_experts, n_all)
        previous = -1
        for _ in range(n_misses):
            previous = tl.min(tl.where((place < 0) & (chosen > previous), chosen, n_experts), 0)
            least = tl.min(key, 0)
            victim = tl.min(tl.where(key == least, own, first + n_experts), 0)
            if is_shared:
                other_least = tl.min(other_key, 0)
                other = tl.min(tl.where(other_key == other_least, x, all_padded), 0)
                is_other = (other_least < least) | ((other_least == least) & (other < victim))
                least = tl.minimum(least, other_least)
                victim = tl.where(is_other, other, victim)
            is_free = n_left > 0
            is_placed = (is_free | (least < _NEVER)) & (counts > 0)
            leaves = is_placed & (n_left == 0)
            unused = tl.load(free_slots + pool * n_places + tl.maximum(n_left, 1) - 1)
            given = tl.where(is_free, unused, tl.load(slot_of + victim))
            placed, gone = tl.where(is_placed, previous, -1), tl.where(leaves, victim, -1)
            written = tl.where(chosen == placed, given, written)
            slot = tl.where(e == placed, given, slot)
            slot = tl.where(own == gone, -1, slot)
            key = tl.where(own == gone, _NEVER, key)
            if is_shared:
                other_key = tl.where(x == gone, _NEVER, other_key)
                tl.debug_barrier()  # all have read the slot
                tl.store(slot_of + victim, -1, mask=leaves & is_other)
            n_left -= (is_placed & is_free).to(tl.int32)

    rank = sorted_ranks(chosen, k)
    home = tl.load(slot_addresses + pool * n_places + place, mask=place >= 0, other=0)
    away = tl.load(host_addresses + first + chosen, mask=keep, other=0)
    target = tl.load(slot_addresses + pool * n_places + written, mask=written >= 0, other=0)
    weight = tl.load(weights + k, mask=k < top_k, other=0.0).to(tl.float32)
    coefficient = gated_weight(weight, keep, tl.load(gating + 1))
    n_skipped = top_k - tl.sum(keep.to(tl.int32), 0)
    hits_before, misses_before = tl.load(hits + layer), tl.load(misses + layer)
    skipped_before = tl.load(skipped + layer)
    tl.debug_barrier()  # all have read what changes
    tl.store(reads + rank, tl.where(place >= 0, home, away), mask=k < top_k)
    tl.store(writes + rank, target, mask=k < top_k)
    tl.store(columns + rank, k, mask=k < top_k)
    tl.store(coefficients + k, coefficient, mask=k < top_k)
    tl.store(dropped + k, tl.where(is_skipped, weight, 0.0), mask=k < top_k)
    tl.store(slot_of + first + e, slot, mask=e < n_experts * counts)
    tl.store(priority + first + e, prio, mask=e < n_experts * counts)
    tl.store(clocks + pool, now + counts)
    tl.store(n_free + pool, n_left)
    tl.store(hits + layer, hits_before + n_hits * counts)
    tl.store(misses + layer, misses_before + n_misses * counts)
    tl.store(skipped + layer, skipped_before + n_skipped * counts)
