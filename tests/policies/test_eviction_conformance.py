"""Every eviction policy, in every implementation, against the rules written out.

What serves a model (`ExpertCache`), what simulates it (the compiled replay) and what a graph on the
device follows (`DeviceTable`) must decide alike. A new policy is a file of its own, a line in the
registry or in `HELD`, and its rule in `step_rules`.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import run_replay, trace_of
from step_rules import Done, run_cache, run_table, written_out
from toy_policies import TOY
from traces import make_spec, make_trace

from adapmoe_lab.policies.eviction.device_table import DeviceTable
from adapmoe_lab.policies.eviction.expert_cache import ExpertCache
from adapmoe_lab.policies.eviction.registry import POLICIES, register, unregister
from adapmoe_lab.records import CachePlan

HELD = [*POLICIES.values(), TOY]
N_EXPERTS = 6


@pytest.fixture(autouse=True, scope="module")
def _toy():
    register(TOY)
    yield
    unregister(TOY.name)


@dataclass
class Case:
    """What steps need by layer, slots and pinned experts by layer, and router scores."""

    sets: list
    slots: list
    pins: list
    scores: np.ndarray
    is_global: bool = False

    def plan(self, policy):
        pinned = self.pins if policy.pins else None
        return CachePlan(
            np.array(self.slots), None, None, "given", is_global=self.is_global, pinned=pinned
        )

    def expected(self, policy, n_before=0):
        pinned = [(layer, e) for layer, pins in enumerate(self.pins) for e in pins]
        return written_out(
            self.sets, self.slots, policy.name, is_global=self.is_global, scores=self.scores,
            pinned=pinned if policy.pins else (), n_before=n_before,
        )  # fmt: skip


@st.composite
def cases(draw):
    n_layers = draw(st.sampled_from([1, 2, 3, 6]))
    members = st.sets(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=4)
    layers = st.lists(members, min_size=n_layers, max_size=n_layers)
    sets = draw(st.lists(layers, min_size=1, max_size=25))
    slots = draw(st.lists(st.integers(0, N_EXPERTS), min_size=n_layers, max_size=n_layers))
    pins = [draw(st.sets(st.integers(0, N_EXPERTS - 1), max_size=n)) for n in slots]
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    scores = rng.dirichlet(np.ones(N_EXPERTS), (len(sets), n_layers)).astype(np.float16)
    return Case(sets, slots, pins, scores)


def by_cache(policy, case, n_before=0):
    cache = ExpertCache(case.plan(policy), N_EXPERTS, policy)
    n_shared = len(case.slots) if case.is_global else 1
    cache._clocks = [n_before * n_shared for _ in cache._clocks]
    return run_cache(cache, case.sets, case.scores)


def by_replay(policy, case):
    trace = trace_of(case.sets, N_EXPERTS, case.scores)
    return run_replay(trace, case.plan(policy), policy.name)


def by_table(policy, case, n_before=0):
    table = DeviceTable(case.plan(policy), N_EXPERTS, policy)
    table.clock[:] = n_before * (len(case.slots) if case.is_global else 1)
    return run_table(table, case.sets, case.scores)


RUN_BY_CACHE = [
    (by_cache, p, is_global) for p in HELD if not p.needs_future for is_global in (0, 1)
]
RUN_BY_TABLE = [(by_table, p, is_global) for p in HELD if not p.host_only for is_global in (0, 1)]
RUN_BY_REPLAY = [(by_replay, policy, is_global) for policy in HELD for is_global in (0, 1)]


def named(value):
    return getattr(value, "name", getattr(value, "__name__", None))


@pytest.mark.parametrize(
    ("run", "policy", "is_global"), [*RUN_BY_CACHE, *RUN_BY_TABLE, *RUN_BY_REPLAY], ids=named
)
@settings(deadline=None)  # the first one compiles
@given(case=cases())
def test_every_step_is_as_the_rules_written_out(run, policy, is_global, case):
    case.is_global = bool(is_global)
    for done, wanted in zip(run(policy, case), case.expected(policy), strict=True):
        assert (done.layer, done.hits, done.placed, done.streamed) == (
            wanted.layer,
            wanted.hits,
            wanted.placed,
            wanted.streamed,
        )
        assert done.evicted == wanted.evicted or run is by_replay


@pytest.mark.parametrize("n_before", [2**24, 2**31, 2**40, 2**56])
@pytest.mark.parametrize(("run", "policy", "is_global"), [*RUN_BY_CACHE, *RUN_BY_TABLE], ids=named)
@settings(max_examples=25)
@given(case=cases())
def test_however_long_it_has_run(run, policy, is_global, n_before, case):
    case.is_global = bool(is_global)
    expected = case.expected(policy, n_before)
    evicted = [step.evicted for step in run(policy, case, n_before)]
    assert evicted == [step.evicted for step in expected]


def run_tokens(step_of, trace, tokens_per_step):
    """Return what an implementation does with the steps of a trace that share their tokens."""
    done = []
    for first in range(0, trace.n_tokens, tokens_per_step):
        tokens = slice(first, first + tokens_per_step)
        for layer in range(trace.spec.n_layers):
            members = np.unique(trace.expert_indices[tokens, layer]).astype(np.int64)
            done.append(step_of(layer, members, trace.router_probs[tokens, layer]))
    return done


def step_of_cache(cache):
    def step(layer, members, scores):
        plan = cache.plan_step(layer, members.tolist(), scores)
        cache.vacate(plan)
        for load in plan.loads:
            cache.occupy(load)
        return Done(layer, list(plan.hits), [e.expert for e in plan.loads], list(plan.streamed))

    return step


def step_of_table(table):
    def step(layer, members, scores):
        done = table.step(layer, members, scores)
        is_placed = ~done.is_hit & (done.slot >= 0)
        kinds = done.is_hit, is_placed, done.slot < 0
        return Done(layer, *(members[kind].tolist() for kind in kinds))

    return step


@pytest.mark.parametrize("tokens_per_step", [1, 7])
@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("policy", [p for p in HELD if not p.needs_future], ids=named)
def test_long_runs_of_several_tokens_are_alike(policy, is_global, tokens_per_step):
    spec = make_spec(n_layers=4, n_experts=16, top_k=3)
    trace = make_trace(spec, n_tokens=1400, tokens_per_step=tokens_per_step)
    pins = [{layer + 2} for layer in range(4)]
    plan = Case([], [7, 5, 9, 3], pins, np.empty(0), is_global).plan(policy)
    expected = run_replay(trace, plan, policy.name)
    assert run_tokens(step_of_cache(ExpertCache(plan, 16, policy)), trace, tokens_per_step) == (
        expected
    )
    if not policy.host_only:
        table = DeviceTable(plan, 16, policy)
        assert run_tokens(step_of_table(table), trace, tokens_per_step) == expected


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("policy", [p for p in HELD if not p.host_only], ids=named)
@given(case=cases(), parts=st.lists(st.booleans(), min_size=4, max_size=4), data=st.data())
def test_cache_and_table_go_on_from_each_other(policy, is_global, case, parts, data):
    case.is_global = is_global
    cache = ExpertCache(case.plan(policy), N_EXPERTS, policy)
    table = DeviceTable(case.plan(policy), N_EXPERTS, policy)
    cuts = sorted(data.draw(st.integers(0, len(case.sets))) for _ in parts)
    done, bounds = [], [0, *cuts, len(case.sets)]
    for is_on_device, first, end in zip([*parts, False], bounds[:-1], bounds[1:], strict=True):
        sets, scores = case.sets[first:end], case.scores[first:end]
        if is_on_device:
            table.take_over(cache.state)
            done += run_table(table, sets, scores)
            cache.restore(table.state)
        else:
            done += run_cache(cache, sets, scores)
    expected = case.expected(policy)
    assert [step.evicted for step in done] == [step.evicted for step in expected]
