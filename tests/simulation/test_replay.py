"""Compiled replay against libcachesim; against the rules in `test_eviction_conformance`."""

import os
import subprocess
import sys

import libcachesim
import numpy as np
import pytest
from replays import replay_all, trace_of
from traces import make_trace

from adapmoe_lab.engine.loading import load
from adapmoe_lab.evaluation.texts import calibration_texts
from adapmoe_lab.profiling.routing.profile import profile
from adapmoe_lab.records import CachePlan, RecordError
from adapmoe_lab.records.files import CACHE_VARIABLE
from adapmoe_lab.simulation.replay.replay import replay

NEVER = 2**62


def plan_of(slots):
    return CachePlan(np.array(slots), None, None, "given")


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
        hits = replay_all(trace, plan_of([n_slots]), eviction).hits[:, 0]
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


@pytest.mark.parametrize("eviction", ["lru", "lfu_aged", "belady"])
def test_chosen_experts_are_enough_for_policies_that_read_no_scores(eviction):
    trace = make_trace()
    found = replay_all(trace.chosen_only(), plan_of([3, 2, 5]), eviction)
    np.testing.assert_array_equal(found.hits, replay_all(trace, plan_of([3, 2, 5]), eviction).hits)


def test_policies_that_read_scores_refuse_a_trace_without():
    with pytest.raises(RecordError, match=r"without router_probs.*choose what reads no scores"):
        replay_all(make_trace().chosen_only(), plan_of([3, 2, 5]), "router_average")


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
from adapmoe_lab.policies.eviction.registry import POLICIES
from adapmoe_lab.simulation.replay.pool_loops import pool_replay
stats = pool_replay(POLICIES["lru"]).dispatcher.stats
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
