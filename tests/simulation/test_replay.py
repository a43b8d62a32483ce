"""Compiled replay against the rules written out, against the class, and against libcachesim."""

import os
import subprocess
import sys

import libcachesim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step_rules import counts, written_out
from traces import make_spec, make_trace

from adapmoe_lab.engine.loading import load
from adapmoe_lab.evaluation.texts import calibration_texts
from adapmoe_lab.policies.eviction.expert_cache import ExpertCache
from adapmoe_lab.policies.eviction.registry import POLICIES
from adapmoe_lab.profiling.routing.profile import profile
from adapmoe_lab.records import CachePlan, RoutingTrace
from adapmoe_lab.records.files import CACHE_VARIABLE
from adapmoe_lab.simulation.replay.replay import replay

NEVER = 2**62
RUNNABLE = [name for name, policy in POLICIES.items() if not policy.needs_future]


def plan_of(slots, is_global=False, pinned=None):
    return CachePlan(np.array(slots), None, None, "given", is_global=is_global, pinned=pinned)


def trace_of(sets, n_experts, scores):
    """Return a trace of one token per member, whose steps need exactly these sets."""
    n_layers = len(sets[0])
    widths = [max(len(members) for members in layers) for layers in sets]
    indices, router_probs, steps = [], [], []
    for step, (layers, width) in enumerate(zip(sets, widths, strict=True)):
        filled = [(sorted(members) * width)[:width] for members in layers]
        indices += np.array(filled).T[:, :, None].tolist()
        router_probs += [scores[step]] * width
        steps += [step] * width
    n = len(steps)
    return RoutingTrace(
        spec=make_spec(n_layers, n_experts, top_k=1),
        token_ids=np.zeros(n),
        expert_indices=indices,
        weights=np.ones((n, n_layers, 1)),
        router_probs=router_probs,
        predictions={},
        sequence_starts=[0],
        step_ids=steps,
        is_decode=np.zeros(n, dtype=bool),
        labels=("all",),
    )


def replayed(trace, plan, eviction):
    result = replay(trace, np.ones(trace.weights.shape, dtype=bool), plan, eviction)
    return np.stack([result.hits, result.loads, result.streamed])


@st.composite
def cases(draw):
    n_layers, n_experts = draw(st.sampled_from([1, 2, 3, 6])), 6
    members = st.sets(st.integers(0, n_experts - 1), min_size=1, max_size=4)
    layers = st.lists(members, min_size=n_layers, max_size=n_layers)
    sets = draw(st.lists(layers, min_size=1, max_size=25))
    slots = draw(st.lists(st.integers(0, n_experts), min_size=n_layers, max_size=n_layers))
    pins = [draw(st.sets(st.integers(0, n_experts - 1), max_size=n)) for n in slots]
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    scores = rng.dirichlet(np.ones(n_experts), (len(sets), n_layers)).astype(np.float16)
    return sets, slots, pins, scores


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("eviction", POLICIES)
@settings(deadline=None)  # the first one compiles
@given(case=cases())
def test_steps_of_several_experts_equal_the_rules_written_out(eviction, is_global, case):
    sets, slots, pins, scores = case
    pins = pins if POLICIES[eviction].pins else [()] * len(slots)
    named = [(layer, expert) for layer, experts in enumerate(pins) for expert in experts]
    expected = written_out(sets, slots, eviction, is_global=is_global, pinned=named, scores=scores)
    result = replayed(trace_of(sets, 6, scores), plan_of(slots, is_global, pins), eviction)
    np.testing.assert_array_equal(result, counts(expected, len(slots)))


@pytest.mark.parametrize("tokens_per_step", [1, 7])
@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("eviction", RUNNABLE)
def test_long_runs_equal_the_class_that_serves_a_model(eviction, is_global, tokens_per_step):
    spec = make_spec(n_layers=4, n_experts=16, top_k=3)
    trace = make_trace(spec, n_tokens=1400, tokens_per_step=tokens_per_step)
    pins = tuple((layer, layer + 2) for layer in range(4)) if POLICIES[eviction].pins else None
    plan = plan_of([7, 5, 9, 3], is_global, pins)
    cache = ExpertCache(plan, 16, POLICIES[eviction])
    expected = np.zeros((3, 1400 // tokens_per_step, 4), dtype=int)
    for step in range(expected.shape[1]):
        tokens = slice(step * tokens_per_step, (step + 1) * tokens_per_step)
        for layer in range(4):
            members = set(trace.expert_indices[tokens, layer].ravel().tolist())
            done = cache.plan_step(layer, members, trace.router_probs[tokens, layer])
            cache.vacate(done)
            for arrived in done.loads:
                cache.occupy(arrived)
            expected[:, step, layer] = len(done.hits), len(done.loads), len(done.streamed)
    np.testing.assert_array_equal(replayed(trace, plan, eviction), expected)


def hits_by_libcachesim(stream, n_slots, eviction):
    """Return which requests of a stream libcachesim finds in a cache of so many objects."""
    cache = {"lru": libcachesim.LRU, "lfu": libcachesim.LFU, "belady": libcachesim.Belady}
    simulated, upcoming, later = cache[eviction](n_slots), {}, []
    for position in reversed(range(len(stream))):
        later.append(upcoming.get(stream[position], NEVER))
        upcoming[stream[position]] = position
    requests = zip(stream, reversed(later), strict=True)
    return [
        simulated.get(libcachesim.Request(obj_id=expert, obj_size=1, next_access_vtime=next_use))
        for expert, next_use in requests
    ]


def streams():
    """Return 60 random streams of single experts, each with its number of experts and slots."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n_experts = int(rng.integers(2, 40))
        weights = rng.dirichlet(np.full(n_experts, rng.choice([0.2, 1.0, 5.0])))
        stream = rng.choice(n_experts, 400, p=weights)
        stays = rng.random(400) < rng.choice([0.0, 0.6])
        for position in np.flatnonzero(stays[1:]) + 1:
            stream[position] = stream[position - 1 - rng.integers(0, min(position, 4))]
        yield stream.tolist(), n_experts, int(rng.integers(1, n_experts + 1))


@pytest.mark.parametrize("eviction", ["lru", "lfu", "belady"])
def test_streams_of_one_expert_hit_when_libcachesim_does(eviction):
    for stream, n_experts, n_slots in streams():
        sets = [[{expert}] for expert in stream]
        trace = trace_of(sets, n_experts, np.zeros((len(sets), 1, n_experts)))
        hits = replayed(trace, plan_of([n_slots]), eviction)[0, :, 0]
        assert hits.tolist() == hits_by_libcachesim(stream, n_slots, eviction)


@pytest.fixture(scope="module")
def demo_trace(tmp_path_factory):
    model = load("demo", dtype="float32", device="cpu", link="none", announce=lambda _: None)
    return profile(model, calibration_texts()[:4], project=tmp_path_factory.mktemp("project"))


@pytest.mark.parametrize("n_slots", [2, 4, 6])
@pytest.mark.parametrize("eviction", ["lru", "lfu", "belady"])
def test_the_demo_s_best_experts_hit_when_libcachesim_does(demo_trace, eviction, n_slots):
    trace = demo_trace.as_decode()
    is_best = np.zeros(trace.weights.shape, dtype=bool)
    np.put_along_axis(is_best, trace.weights.argmax(axis=2)[:, :, None], True, axis=2)
    result = replay(trace, is_best, plan_of([n_slots] * 8), eviction)
    for layer in range(8):
        stream = trace.expert_indices[:, layer][is_best[:, layer]].tolist()
        expected = hits_by_libcachesim(stream, n_slots, eviction)
        assert result.hits[:, layer].tolist() == expected


def test_an_unknown_policy_is_named():
    trace = make_trace(n_tokens=4)
    with pytest.raises(ValueError, match="eviction='magic' is unknown; expected one of lru, lfu"):
        replay(trace, np.ones(trace.weights.shape, dtype=bool), None, "magic")


CODE = """
import sys, time
sys.path.insert(0, "tests")
import numpy as np
import adapmoe_lab.simulation.replay.replay
assert "numba" not in sys.modules
from traces import make_trace
trace = make_trace(n_tokens=20)
keep = np.ones(trace.weights.shape, dtype=bool)
adapmoe_lab.simulation.replay.replay.replay(trace, keep, None)
from adapmoe_lab.simulation.replay.pool_loops import replay_pool
stats = replay_pool.dispatcher.stats
print(sum(stats.cache_hits.values()), stats.cache_path)
"""


def run_fresh(cache_folder):
    """Replay something in a new process; return how often it found compiled code, and where."""
    environment = {**os.environ, CACHE_VARIABLE: str(cache_folder)}
    command = [sys.executable, "-c", CODE]
    output = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    n_found, place = output.stdout.split(maxsplit=1)
    return int(n_found), place.strip()


def test_a_new_process_does_not_compile_again(tmp_path):
    first, second = run_fresh(tmp_path), run_fresh(tmp_path)
    assert (first[0], second[0]) == (0, 1)
    assert first[1].startswith(str(tmp_path / "compiled"))


def test_where_nothing_can_be_kept_every_process_compiles(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert run_fresh(tmp_path / "file") == (0, "None")
