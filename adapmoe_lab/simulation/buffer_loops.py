"""The buffer of experts fetched ahead, compiled: who is in it, who goes next, who is asked for.

A buffer is a float64 array [rows, 6]; what its columns hold is named below.
"""

from __future__ import annotations

from adapmoe_lab.policies import prefetch
from adapmoe_lab.policies.prefetch import N_PIECES
from adapmoe_lab.simulation.compiled import called, inlined
from adapmoe_lab.simulation.replay import HIT

needed_at = inlined(prefetch.needed_at)
expected_gain_s = inlined(prefetch.expected_gain_s)

NOW, LINK_FREE, N_ASKED, N_BYTES, LINK_S, N_LOGGED = range(6)
"""Places in the clock's state: the time, when the link is free, how many experts were asked for
ahead, the bytes that crossed and the seconds they took, the events written down."""

SECONDS, BYTES = range(2)
DENSE_LAYER_S, EXPERT_S, HEAD_S, MISS_S, WAIT_S, GUESS_S, PIECE_S = range(7)
"""Places in the pace, as `timeline.StepCosts` names them."""

LAYER, MEMBER, BEGUN, ASKED_AT, ORDER, ARRIVAL = range(6)
"""Places in a row of the buffer: whose expert it is for, layer -1 for nobody's; pieces begun; when
it was asked for, and as which; when its last piece begun arrives."""


@inlined
def next_in_line(rows):
    """Return the row whose next piece goes first, or -1: of the nearest layer, then the oldest."""
    at = -1
    for row in range(len(rows)):
        if rows[row, LAYER] >= 0 and rows[row, BEGUN] < N_PIECES:
            is_older = rows[row, LAYER] == rows[at, LAYER] and rows[row, ORDER] < rows[at, ORDER]
            if at < 0 or rows[row, LAYER] < rows[at, LAYER] or is_older:
                at = row
    return at


@inlined
def row_with(rows, layer, expert):
    """Return the row of the buffer that an expert has, or -1."""
    for row in range(len(rows)):
        if rows[row, LAYER] == layer and rows[row, MEMBER] == expert:
            return row
    return -1


@called
def ask(guessed, probability, absent, target, distance, times, clock, pace, rest, piece, rows):
    """Ask for those guesses [C] of a layer that are worth it, instead of earlier ones not begun.

    `times` are when the link can begin with it, when the present layer is done, and what the
    experts of a layer take.
    """
    begins_at, ready_at, layer_experts_s = times
    clock[NOW] += pace[GUESS_S]
    for row in range(len(rows)):
        if rows[row, LAYER] == target and rows[row, BEGUN] == 0:
            is_guessed = False
            for c in range(len(guessed)):
                is_guessed |= guessed[c] == rows[row, MEMBER]
            if not is_guessed:
                rows[row, LAYER] = -1
    needed_at_s = needed_at(ready_at, distance, pace[DENSE_LAYER_S], layer_experts_s)
    for c in range(len(guessed)):
        expert = guessed[c]
        if expert < 0 or not absent[c] or row_with(rows, target, expert) >= 0:
            continue
        begins, at = begins_at, -1
        for row in range(len(rows) - 1, -1, -1):
            if rows[row, LAYER] < 0:
                at = row
        for row in range(len(rows)):
            if 0 <= rows[row, LAYER] <= target:
                layer, other = int(rows[row, LAYER]), int(rows[row, MEMBER])
                begins += rest[layer, other, int(rows[row, BEGUN]), SECONDS]
        load_s, piece_s = rest[target, expert, 0, SECONDS], piece[target, expert, 0, SECONDS]
        gain_s = expected_gain_s(probability[c], begins, needed_at_s, load_s, piece_s)
        if at >= 0 and gain_s > 0:
            rows[at, LAYER], rows[at, MEMBER], rows[at, BEGUN] = target, expert, 0
            rows[at, ASKED_AT], rows[at, ORDER] = clock[NOW], clock[N_ASKED]
            clock[N_ASKED] += 1


@inlined
def settle(rows, layer, members, fates, row_of):
    """Tell which missing members were begun ahead; give up the layer's other rows.

    Fills `row_of` with the member's row or -1; returns how many rows were begun for nothing.
    """
    n_wasted = 0
    for i in range(len(members)):
        row_of[i] = row_with(rows, layer, members[i]) if fates[i] != HIT else -1
        if row_of[i] >= 0 and rows[row_of[i], BEGUN] == 0:
            row_of[i] = -1
    for row in range(len(rows)):
        if rows[row, LAYER] == layer:
            is_needed = False
            for i in range(len(members)):
                is_needed |= row_of[i] == row
            if not is_needed:
                n_wasted += rows[row, BEGUN] > 0
                rows[row, LAYER] = -1
    return n_wasted
