"""An eviction policy and a gating rule that the package does not know, from tune to engine."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from runs import PROMPT, decode
from toy_policies import TOY, SameInEveryLayer
from traces import make_sensitivity, make_spec, make_trace

import adapmoe_lab as lab
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.policies.eviction import registry as evictions
from adapmoe_lab.policies.gating import registry as rules
from adapmoe_lab.policies.gating.keep import kept_experts
from adapmoe_lab.policies.gating.uniform import UniformCut
from adapmoe_lab.records import TunedConfig
from adapmoe_lab.records.files import CACHE_VARIABLE
from adapmoe_lab.simulation.search.cache_search import best_cache


@pytest.fixture
def _toys():
    evictions.register(TOY)
    rules.register("toy", SameInEveryLayer)
    yield
    evictions.unregister("toy")
    rules.unregister("toy")


@pytest.mark.usefixtures("_toys")
def test_they_are_tuned_saved_simulated_and_run(load_tiny, texts, tmp_path):
    model = load_tiny()
    trace = lab.profile(model, texts, project=tmp_path)
    found = lab.tune(
        trace, make_sensitivity(model.spec), expert_memory="70%", skipped_fraction=0.2, method="toy"
    )
    assert found.evidence["method"] == "toy"
    kept = kept_experts(trace, found.gating).mean(axis=(0, 2))
    np.testing.assert_allclose(kept, 0.8, atol=0.01)  # in every layer

    config = replace(found, plan=slots_plan(model.spec, 2), eviction="toy")
    path = config.save(tmp_path / "tuned.json")
    assert TunedConfig.load(path).eviction == "toy"
    assert lab.simulate(trace, config).loads_per_token.sum() > 0
    with model.running(config):
        decode(model.hf, model.encode(PROMPT), 8)
        assert model.engine.traffic.skipped > 0
        assert model.engine.traffic.misses.sum() > 0

    evictions.unregister("toy")
    saved = TunedConfig.load(path)
    with pytest.raises(ValueError, match="eviction='toy' is unknown; expected one of lru, lfu"):
        model.apply(saved)
    with pytest.raises(ValueError, match="eviction='toy' is unknown; expected one of lru, lfu"):
        lab.simulate(trace, saved)
    evictions.register(TOY)


@pytest.mark.usefixtures("_toys")
def test_the_cache_search_takes_what_loads_least():
    trace, pairs = make_trace(make_spec(n_layers=1), n_tokens=400), 2 * np.arange(400)[:, None]
    experts = np.stack([pairs % 8, (pairs + 1) % 8], axis=2)  # one pair after another
    trace = replace(trace, expert_indices=experts, predictions={})
    best, tried = best_cache(trace, slots_plan(trace.spec, 4), evictions=["lru", "toy"])
    assert [(choice.division, choice.eviction) for choice in tried] == [
        ("uniform", "lru"),
        ("uniform", "toy"),
        ("measured", "lru"),
        ("measured", "toy"),
    ]
    assert best.eviction == "toy"
    with pytest.raises(ValueError, match="'belady' reads what comes later"):
        best_cache(trace, slots_plan(trace.spec, 4), evictions=["belady"])
    with pytest.raises(ValueError, match="eviction='oldest' is unknown"):
        best_cache(trace, slots_plan(trace.spec, 4), evictions=["oldest"])


@pytest.mark.usefixtures("_toys")
def test_a_name_stands_for_one_rule():
    rules.register("toy", SameInEveryLayer)  # the same
    with pytest.raises(ValueError, match=r"Another gating rule is called 'toy'\. Give this one a"):
        rules.register("toy", UniformCut)
    with pytest.raises(ValueError, match="method='oldest' is unknown; expected one of uniform,"):
        rules.check_method("oldest")


SIMULATE = """
from dataclasses import replace
import adapmoe_lab as lab
from toy_policies import TOY, SameInEveryLayer
from traces import make_sensitivity, make_trace
from adapmoe_lab.policies.eviction import registry as evictions
from adapmoe_lab.policies.gating import registry as rules
from adapmoe_lab.simulation.replay.pool_loops import pool_replay
evictions.register(TOY)
rules.register("toy", SameInEveryLayer)
trace = make_trace()
sensitivity = make_sensitivity(trace.spec)
config = lab.tune(trace, sensitivity, expert_memory="50%", skipped_fraction=0.1, method="toy")
simulation = lab.simulate(trace, replace(config, eviction="toy"))
print(simulation.loads_per_token.sum(), sum(pool_replay(TOY).dispatcher.stats.cache_hits.values()))
"""


@pytest.mark.slow
def test_a_second_process_simulates_them_with_the_code_of_the_first(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        CACHE_VARIABLE: str(tmp_path),
    }
    command = [sys.executable, "-c", SIMULATE]
    printed = [
        subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout
        for _ in range(2)
    ]
    (loads, n_found), (loads_again, n_found_again) = map(str.split, printed)
    assert loads == loads_again
    assert (n_found, n_found_again) == ("0", "1")
