"""The step rules and every eviction policy, written out from what happened so far, slowly.

Nothing is kept up to date: whoever leaves is found by looking through the whole history again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SCORE_FORGETTING, USE_FORGETTING = 1311 / 2**16, 3277 / 2**16  # 0.02 and 0.05


@dataclass
class Done:
    """What one step of one layer did: experts, each list ascending; evicted as (layer, expert)."""

    layer: int
    hits: list = field(default_factory=list)
    placed: list = field(default_factory=list)
    streamed: list = field(default_factory=list)
    evicted: list = field(default_factory=list)
    scores: object = None

    @property
    def members(self):
        return sorted([*self.hits, *self.placed, *self.streamed])


def written_out(sets, slots, eviction, *, is_global=False, pinned=(), scores=None, n_before=0):
    """Return what every step of every layer does, as `Done` in order.

    Args:
        sets: a list of steps, each the sets of experts that its layers need.
        slots: slots per layer; their sum in a global pool.
        eviction: name of the policy.
        is_global: whether the layers share the slots.
        pinned: (layer, expert) that never leave.
        scores: float [step, layer, expert], the mean router scores.
        n_before: forward passes before the first, which left nothing behind.
    """
    n_layers = len(slots)
    flat = [
        (layer, set(members), None if scores is None else scores[step][layer])
        for step, layers in enumerate(sets)
        for layer, members in enumerate(layers)
    ]
    if is_global:
        return _pool(flat, sum(slots), eviction, set(pinned), n_layers, n_before)
    done = {}
    for own in range(n_layers):
        mine = [step for step in flat if step[0] == own]
        kept = {expert for layer, expert in pinned if layer == own}
        alone = [(0, members, score) for _, members, score in mine]
        pool = _pool(alone, slots[own], eviction, {(0, expert) for expert in kept}, 1, n_before)
        for number, step in enumerate(pool):
            step.layer = own
            step.evicted = [(own, expert) for _, expert in step.evicted]
            done[number, own] = step
    return [done[key] for key in sorted(done)]


def _pool(flat, n_slots, eviction, pinned, n_layers, n_before):
    resident, done = set(), []
    for now, (layer, members, scores) in enumerate(flat):
        step = Done(layer, scores=scores)
        step.hits = sorted(e for e in members if (layer, e) in resident)
        misses = sorted(e for e in members if (layer, e) not in resident)
        history = [*done, step]
        for expert in misses:
            leaving = resident - {(layer, e) for e in members} - pinned
            if len(resident) == n_slots and leaving:
                step.streamed = [e for e in misses if e not in step.placed]
                victim = min(
                    leaving,
                    key=lambda who: (
                        _worth(eviction, who, history, flat, now, n_layers, n_before),
                        who,
                    ),
                )
                resident.remove(victim)
                step.evicted.append(victim)
            if len(resident) < n_slots:
                resident.add((layer, expert))
                step.placed.append(expert)
        step.streamed = [e for e in misses if e not in step.placed]
        done.append(step)
    return done


def _worth(eviction, who, history, flat, now, n_layers, n_before):
    """Return what the smallest of leaves first."""
    layer, expert = who
    past = history[:-1]
    uses = [t for t, step in enumerate(past) if step.layer == layer and expert in step.members]
    of_layer = [step for step in history if step.layer == layer]
    if eviction in ("lru", "static"):
        return uses[-1], expert not in past[uses[-1]].hits, expert
    if eviction == "toy":
        return -uses[-1], expert in past[uses[-1]].hits
    loaded = max(t for t in uses if expert in past[t].placed)
    if eviction == "lfu":
        last = uses[-1]
        since = sum(t >= loaded for t in uses)
        return since, last, expert not in past[last].hits, expert
    if eviction == "lfu_aged":
        ages = [age for age, step in enumerate(reversed(of_layer)) if expert in step.members]
        return sum((1 - USE_FORGETTING) ** age for age in ages)
    if eviction == "router_average":
        return sum(
            SCORE_FORGETTING * (1 - SCORE_FORGETTING) ** age * float(step.scores[expert])
            for age, step in enumerate(reversed(of_layer))
        )
    if eviction == "least_stale":
        return uses[-1] // n_layers == now // n_layers, loaded, expert
    if eviction == "hobbit":
        high = sum(_is_high(past[t], expert) for t in uses)
        terms = n_before + uses[-1] // n_layers + len(uses) + high
        away = (layer - history[-1].layer) % n_layers
        return terms * n_layers - away * (n_before + now // n_layers)
    assert eviction == "belady"
    later = [t for t in range(now + 1, len(flat)) if flat[t][0] == layer and expert in flat[t][1]]
    return -min(later, default=len(flat))


def _is_high(step, expert):
    scores = {e: int(2**24 * float(np.float16(step.scores[e]))) for e in step.members}
    above = sum(score for score in scores.values() if score > scores[expert])
    return 5 * above <= 3 * sum(scores.values())


def run_cache(cache, sets, scores=None):
    """Return what an `ExpertCache` does with the same steps."""
    done = []
    for layer, members, given in _steps(sets, scores):
        plan = cache.plan_step(layer, members, given)
        cache.vacate(plan)
        for load in plan.loads:
            cache.occupy(load)
        placed = [load.expert for load in plan.loads]
        evicted = [load.evicted for load in plan.loads if load.evicted is not None]
        done.append(Done(layer, list(plan.hits), placed, list(plan.streamed), evicted))
    return done


def run_table(table, sets, scores=None):
    """Return what a `DeviceTable` does with the same steps, with no slot taken twice."""
    done = []
    for layer, members, given in _steps(sets, scores):
        ids, before = np.array(sorted(members)), table.slot_of.copy()
        step = table.step(layer, ids, given)
        assert step.slot.tolist() == table.slot_of[layer, ids].tolist()
        pools = [table.slot_of] if len(table.clock) == 1 else table.slot_of
        for slots in pools:
            taken = slots[slots >= 0].tolist()
            assert sorted(taken) == list(range(len(taken)))
        gone = np.argwhere((before >= 0) & (table.slot_of < 0)).tolist()
        left = {before[at, expert]: (at, expert) for at, expert in gone}
        is_placed = ~step.is_hit & (step.slot >= 0)
        done.append(
            Done(
                layer,
                ids[step.is_hit].tolist(),
                ids[is_placed].tolist(),
                ids[step.slot < 0].tolist(),
                [left[slot] for slot in step.slot[is_placed].tolist() if slot in left],
            )
        )
    return done


def _steps(sets, scores):
    """Yield layer, members and router scores [1, E] of every step."""
    for number, layers in enumerate(sets):
        for layer, members in enumerate(layers):
            yield layer, members, None if scores is None else scores[number][layer][None]
