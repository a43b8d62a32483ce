"""The clock of a replay, by cases small enough to be worked out on paper."""

import numpy as np
import pytest
from traces import make_spec, make_trace

from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.records.hook_points import HookPoint
from adapmoe_lab.records.step_costs import HostCosts, StepCosts
from adapmoe_lab.simulation.replay.outcomes import HIT, LOAD, STREAM
from adapmoe_lab.simulation.replay.recorded_candidates import Candidates
from adapmoe_lab.simulation.replay.replay import Replay, replay
from adapmoe_lab.simulation.timing.events import EVENT_KINDS
from adapmoe_lab.simulation.timing.timeline import run_timeline

LOAD_S, DENSE_S, EXPERT_S = 4.0, 2.0, 1.0


def replay_of(*layers):
    """Return one step in which each layer needs experts, as {expert: outcome}."""
    members = np.array([list(layer) for layer in layers], dtype=np.int16)
    outcomes = np.array([list(layer.values()) for layer in layers], dtype=np.int8)
    starts = np.tile([0, members.shape[1]], (len(layers), 1))
    counts = [(outcomes == outcome).sum(axis=1)[None] for outcome in (HIT, LOAD, STREAM)]
    absent = np.ones((1, 1, len(layers), 2), dtype=bool)
    return Replay(*counts, np.ones(1, dtype=bool), members, starts, outcomes, absent)


def candidate_of(
    target, experts, probability=0.9, n_layers=2, distance=1, hook_point=HookPoint.EXPERTS_INPUT
):
    """Return candidates for one layer, predicted at the experts' input before it, or an output."""
    predicted = np.full((1, 1, n_layers, 2), -1, dtype=np.int16)
    predicted[0, 0, target, : len(experts)] = experts
    chance = np.full((1, 1, n_layers, 2), probability)
    return Candidates(np.array([hook_point]), np.array([distance]), predicted, chance)


def costs_of(n_layers=2, load_s=LOAD_S, expert_s=EXPERT_S, n_experts=8, **host):
    """Return costs of experts of 400 bytes; `host` are those beside experts and link."""
    return StepCosts(
        HostCosts(**{"dense_layer_s": DENSE_S, **host}),
        expert_s,
        load_s=lambda n_bytes: load_s * n_bytes / 400,
        expert_bytes=np.full((n_layers, n_experts), 400),
    )


def test_each_expert_takes_its_own_time():
    """One layer, nothing missing: a step takes what its own experts take."""
    rng = np.random.default_rng(0)
    expert_s = rng.uniform(0.1, 2.0, (3, 8))
    trace = make_trace(n_tokens=50)
    replayed = replay(trace, np.ones(trace.weights.shape, bool), None)
    timed = run_timeline(replayed, costs_of(3, load_s=0.0, expert_s=expert_s))
    layers = np.arange(3)[None, :, None]
    expected = expert_s[layers, trace.expert_indices].sum(axis=(1, 2)) + 3 * DENSE_S
    np.testing.assert_allclose(timed.step_s, expected, rtol=1e-9)
    watched = run_timeline(replayed, costs_of(3, load_s=0.0, expert_s=expert_s), n_events=1000)
    kinds, at, experts, begin, end = watched.events.T
    own = kinds == EVENT_KINDS.index("expert")
    places = at[own].astype(int), experts[own].astype(int)
    np.testing.assert_allclose((end - begin)[own], expert_s[places], rtol=1e-9)


def layer_by_events(hits, loads, streamed, load_s, expert_s):
    """Walk through one layer's step: a link in order, two staging rows, one compute unit."""
    now, link_free, stream_done = hits * expert_s, 0.0, []
    for miss in range(loads + streamed):
        position = miss - loads  # within the streamed experts
        row_free = stream_done[position - 2] if position >= 2 else 0.0
        link_free = max(link_free, row_free) + load_s
        now = max(now, link_free) + expert_s
        if position >= 0:
            stream_done.append(now)
    return now


@pytest.mark.parametrize("load_s", [0.1, 1.0, 3.0])
def test_a_layer_without_prefetch_takes_what_its_events_take(load_s):
    for hits, loads, streamed in np.ndindex(4, 4, 5):
        if hits + loads + streamed == 0:
            continue
        outcomes = [HIT] * hits + [LOAD] * loads + [STREAM] * streamed
        members = dict(enumerate(np.random.default_rng(hits).permutation(outcomes).tolist()))
        wide = costs_of(1, load_s, expert_s=1.0, n_experts=16)
        timeline = run_timeline(replay_of(members), wide)
        expected = DENSE_S + layer_by_events(hits, loads, streamed, load_s, 1.0)
        assert timeline.ended_s[0] == pytest.approx(expected)
        assert timeline.n_bytes[0] == 400 * (loads + streamed)


@pytest.mark.parametrize("wait_s", [0.2, -0.2, -100.0])
def test_layers_timed_by_themselves_take_what_the_whole_clock_says(wait_s):
    trace = make_trace(make_spec(n_experts=12, top_k=6), n_tokens=300)
    replayed = replay(trace, kept_experts(trace, None), slots_plan(trace.spec, 2), "lru")
    expert_s = np.random.default_rng(0).uniform(0.1, 0.5, (3, 16))
    wide = costs_of(3, 0.7, expert_s, n_experts=16, head_s=1.1, miss_s=0.05, wait_s=wait_s)
    whole = run_timeline(replayed, wide, n_events=1)
    by_layer = run_timeline(replayed, wide)
    assert replayed.streamed.max() > 3
    for name in ("stall_s", "link_s", "ended_s"):
        np.testing.assert_allclose(getattr(by_layer, name), getattr(whole, name), atol=1e-9)
    np.testing.assert_array_equal(by_layer.n_bytes, whole.n_bytes)


def test_what_the_host_does_while_a_device_waits_is_hidden_as_far_as_it_waits():
    """Layer 0 hits and takes 6 s; layer 1 waits 4 s of its 10."""
    replayed = replay_of({0: HIT}, {5: LOAD})
    for hidden_s, expected in ((1.5, 14.5), (4.0, 12.0), (9.0, 12.0)):
        costs = costs_of(dense_layer_s=5.0, wait_s=-hidden_s)
        timeline = run_timeline(replayed, costs, n_events=1)
        assert timeline.ended_s[0] == expected
        assert timeline.stall_s.tolist() == [[0, 4]]


@pytest.mark.parametrize(
    ("hook_point", "expected"), [(HookPoint.EXPERTS_INPUT, 12.5), (HookPoint.LAYER_OUTPUT, 16.0)]
)
def test_nothing_is_hidden_where_the_host_waits_for_a_layers_output(hook_point, expected):
    """Nothing is predicted; the layers are those of the test above."""
    replayed = replay_of({0: HIT}, {5: LOAD})
    costs = costs_of(dense_layer_s=5.0, wait_s=-3.5)
    silent = candidate_of(1, [], hook_point=hook_point)
    assert run_timeline(replayed, costs, silent, 2).ended_s[0] == expected


def test_a_right_candidate_saves_what_has_crossed_when_it_is_demanded():
    """Issued at 2; chunks of 1 s from 2 to 5, when the next layer runs; the rest is demanded."""
    replayed = replay_of({0: HIT}, {5: LOAD})
    before = run_timeline(replayed, costs_of())
    after = run_timeline(replayed, costs_of(), candidate_of(1, [5]), 2, n_events=20)
    assert before.ended_s[0] == 2 + 1 + 2 + 4 + 1
    assert after.ended_s[0] == before.ended_s[0] - 3
    assert (after.used.tolist(), after.wasted.sum()) == ([[0, 1]], 0)
    assert after.n_bytes[0] == before.n_bytes[0] == 400
    assert after.stall_s.tolist() == [[0, 1]]
    ahead = after.events[after.events[:, 0] == EVENT_KINDS.index("ahead")]
    assert ahead[:, 3].tolist() == [2, 3, 4]
    demand = after.events[after.events[:, 0] == EVENT_KINDS.index("demand")]
    assert demand[:, 3:].tolist() == [[5, 6]]


def test_a_wrong_candidate_delays_a_demand_by_less_than_a_chunk():
    replayed = replay_of({0: HIT}, {5: LOAD})
    slow = costs_of(load_s=2.4 * LOAD_S)  # chunks of 2.4 s: the second ends 1.8 s too late
    without = run_timeline(replayed, slow)
    wrong = run_timeline(replayed, slow, candidate_of(1, [6]), 2)
    assert wrong.ended_s[0] == pytest.approx(without.ended_s[0] + 1.8)
    assert (wrong.used.sum(), wrong.wasted.tolist()) == (0, [[0, 1]])
    assert wrong.n_bytes[0] == 400 + 200


def test_a_candidate_that_is_resident_or_not_worth_it_is_not_prefetched():
    replayed = replay_of({0: HIT}, {5: LOAD})
    here = Replay(**{**vars(replayed), "absent": np.zeros_like(replayed.absent)})
    for run, candidates in (
        (here, candidate_of(1, [6])),
        (replayed, candidate_of(1, [6], probability=0.0)),
        (replayed, candidate_of(1, [6], probability=0.2)),  # 0.2 x 3 s against 0.8 x 1 s
    ):
        timeline = run_timeline(run, costs_of(), candidates, 2)
        assert timeline.wasted.sum() == 0
        assert timeline.n_bytes[0] == 400


def test_no_prefetch_begins_when_the_link_has_no_idle_time():
    """Layer 0 loads until 6, is done at 7; layer 1 needs its own at 9: one second one begins."""
    replayed = replay_of({0: LOAD, 1: HIT}, {5: LOAD, 6: LOAD})
    busy = run_timeline(replayed, costs_of(), candidate_of(1, [5, 6]), 4)
    assert busy.used.tolist() == [[0, 1]]
    crowded = replay_of({0: LOAD, 1: LOAD, 2: LOAD}, {5: LOAD, 6: HIT, 7: HIT})
    never = run_timeline(crowded, costs_of(expert_s=0.0), candidate_of(1, [6], probability=0.3), 4)
    assert never.wasted.sum() == 0


def test_the_buffer_holds_no_more_than_its_slots():
    replayed = replay_of({0: HIT, 1: HIT}, {5: LOAD, 6: LOAD})
    quick = costs_of(load_s=0.4)
    assert run_timeline(replayed, quick, candidate_of(1, [5, 6]), 2).used.sum() == 2
    assert run_timeline(replayed, quick, candidate_of(1, [5, 6]), 1).used.sum() == 1


def test_demands_go_first_and_what_was_begun_goes_on_after_them():
    """Issued for layer 2 while layer 0 runs; the demand of layer 1 comes between its chunks."""
    replayed = replay_of({0: HIT}, {3: LOAD}, {5: LOAD})
    candidates = candidate_of(2, [5], n_layers=3, distance=2)
    timeline = run_timeline(replayed, costs_of(3), candidates, 2, n_events=30)
    link = timeline.events[timeline.events[:, 0] >= 2]
    kinds = [EVENT_KINDS[int(kind)] for kind in link[:, 0]]
    assert kinds == ["ahead"] * 3 + ["demand", "ahead"]
    assert (link[1:, 3] >= link[:-1, 4]).all()
    assert timeline.used.tolist() == [[0, 0, 1]]
