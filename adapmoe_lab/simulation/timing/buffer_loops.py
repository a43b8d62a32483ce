"""The buffer of experts fetched ahead, compiled: who is in it, who goes next, who is asked for.

A buffer is a float64 array [rows, 6]; what its columns hold is named below.
"""

from __future__ import annotations

from adapmoe_lab.policies.prefetch import expected_gain as prefetch
from adapmoe_lab.policies.prefetch.expected_gain import N_PIECES
from adapmoe_lab.records.prefetch import Moment
from adapmoe_lab.simulation.compiled import called, inlined
from adapmoe_lab.simulation.replay.replay import HIT

needed_at = inlined(prefetch.needed_at)
expected_gain_s = inlined(prefetch.expected_gain_s)

TOKEN, EXPERTS_INPUT = int(Moment.TOKEN), int(Moment.EXPERTS_INPUT)
LAYER_OUTPUT, LAST_HIDDEN = int(Moment.LAYER_OUTPUT), int(Moment.LAST_HIDDEN)

NOW, LINK_FREE, N_ASKED, N_BYTES, LINK_S, N_LOGGED = range(6)
"""Places in the clock's state: the time, when the link is free, how many experts were asked for
ahead, the bytes that crossed and the seconds they took, the events written down."""

SECONDS, BYTES = range(2)
(
    DENSE_LAYER_S, HEAD_S, MISS_S, WAIT_S, GUESS_S, PIECE_S, ASK_S, ASK_OUTPUT_S,
) = range(8)  # fmt: skip
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


@inlined
def begins_at(clock):
    """Return when the link can begin with what is asked for now, if nothing is demanded."""
    return max(clock[NOW], clock[LINK_FREE])


@inlined
def _is_open(j, step, target, absent, rows):
    """Whether a layer has guesses of absent experts, or earlier ones that are not begun."""
    is_open = False
    for c in range(absent.shape[3]):
        is_open |= absent[j, step, target, c]
    for row in range(len(rows)):
        is_open |= rows[row, LAYER] == target and rows[row, BEGUN] == 0
    return is_open


@inlined
def ask_all(
    moment, layer, step, first_begins_at, ready_at, layer_experts_s, n_layers,
    moments, distances, guessed, probability, absent, clock, pace, rest, piece, rows,
):  # fmt: skip
    """Ask for what is worth it of all that is guessed at a moment, everybody having been asked.

    `step` is the step that the guesses are of; `first_begins_at` is when the link can begin,
    `ready_at` when the layer is done, and `layer_experts_s` what the experts of a layer take. The
    arrays are those that `run_clock` takes.
    """
    n_speaking = 0
    for j in range(len(moments)):
        n_speaking += moments[j] == moment and layer + distances[j] < n_layers
    if n_speaking > 0:
        clock[NOW] += pace[ASK_S] + (pace[ASK_OUTPUT_S] if moment == LAYER_OUTPUT else 0.0)
        clock[NOW] += n_speaking * pace[GUESS_S]
    for j in range(len(moments)):
        target = layer + distances[j]
        speaks = moments[j] == moment and target < n_layers
        if speaks and _is_open(j, step, target, absent, rows):
            distance = max(1, distances[j])
            needed_at_s = needed_at(ready_at, distance, pace[DENSE_LAYER_S], layer_experts_s)
            _ask(
                j, step, target, first_begins_at, needed_at_s,
                guessed, probability, absent, clock, rest, piece, rows,
            )  # fmt: skip


@called
def _ask(
    j, step, target, first_begins_at, needed_at_s,
    guessed, probability, absent, clock, rest, piece, rows,
):  # fmt: skip
    """Ask for those guesses of a predictor that are worth it, instead of earlier ones not begun."""
    n_guesses, p = guessed.shape[3], step if probability.shape[1] > 1 else 0
    for row in range(len(rows)):
        if rows[row, LAYER] == target and rows[row, BEGUN] == 0:
            is_guessed = False
            for c in range(n_guesses):
                is_guessed |= guessed[j, step, target, c] == rows[row, MEMBER]
            if not is_guessed:
                rows[row, LAYER] = -1
    for c in range(n_guesses):
        expert = guessed[j, step, target, c]
        is_absent = expert >= 0 and absent[j, step, target, c]
        if not is_absent or row_with(rows, target, expert) >= 0:
            continue
        starts_at, at = first_begins_at, -1
        for row in range(len(rows) - 1, -1, -1):
            if rows[row, LAYER] < 0:
                at = row
        if at < 0:
            break
        for row in range(len(rows)):
            if 0 <= rows[row, LAYER] <= target:
                layer, other = int(rows[row, LAYER]), int(rows[row, MEMBER])
                starts_at += rest[layer, other, int(rows[row, BEGUN]), SECONDS]
        load_s, piece_s = rest[target, expert, 0, SECONDS], piece[target, expert, 0, SECONDS]
        chance = probability[j, p, target, c]
        if expected_gain_s(chance, starts_at, needed_at_s, load_s, piece_s) > 0:
            rows[at, LAYER], rows[at, MEMBER], rows[at, BEGUN] = target, expert, 0
            rows[at, ASKED_AT], rows[at, ORDER] = clock[NOW], clock[N_ASKED]
            clock[N_ASKED] += 1


@inlined
def settle(rows, layer, members, fates, first, end, row_of):
    """Tell which missing members first..end-1 were begun ahead; give up the layer's other rows.

    Fills `row_of`, from its start, with the member's row or -1; returns how many rows were begun
    for nothing.
    """
    n_wasted = 0
    for i in range(end - first):
        is_missing = fates[layer, first + i] != HIT
        row_of[i] = row_with(rows, layer, members[layer, first + i]) if is_missing else -1
        if row_of[i] >= 0 and rows[row_of[i], BEGUN] == 0:
            row_of[i] = -1
    for row in range(len(rows)):
        if rows[row, LAYER] == layer:
            is_needed = False
            for i in range(end - first):
                is_needed |= row_of[i] == row
            if not is_needed:
                n_wasted += rows[row, BEGUN] > 0
                rows[row, LAYER] = -1
    return n_wasted
