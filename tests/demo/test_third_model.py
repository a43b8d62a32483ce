"""The third trained model: its records, the command that makes it, and its recorded routing."""

import shutil

import numpy as np
import pytest
from model_records import (
    DEMO,
    RECORDS,
    THIRD,
    documented_commands,
    read,
    recorded_files,
    recorded_recipe,
)

from adapmoe_lab.assets import recording_file
from adapmoe_lab.demo.card import write_card
from adapmoe_lab.demo.corpus import DEMO_DOMAINS
from adapmoe_lab.models.demo_architecture import build_model, n_parameters
from adapmoe_lab.records import RoutingTrace
from adapmoe_lab.simulation.statistics.routing_patterns import expert_use, locality

N_LAYERS, N_EXPERTS, TOP_K = 16, 64, 8
WINDOW, WINDOWS_PER_DOMAIN = 512, 2


@pytest.fixture(scope="module")
def trace():
    return RoutingTrace.load(recording_file())


@pytest.fixture(scope="module")
def routing():
    return read(THIRD, "measurements.json")["routing"]


def test_its_routers_have_the_shape_of_olmoe_s():
    record = read(THIRD, "training_record.json")
    shape = recorded_recipe(THIRD).architecture
    assert shape.family == "qwen3_moe"
    assert (shape.n_layers, shape.n_experts, shape.top_k) == (N_LAYERS, N_EXPERTS, TOP_K)
    assert record["n_parameters"] == n_parameters(build_model(shape, 0))


def test_it_is_trained_as_the_demo_was_for_ten_minutes_at_most():
    demo, third = recorded_recipe(DEMO).as_dict(), recorded_recipe(THIRD).as_dict()
    assert {name for name in demo if third[name] != demo[name]} == {"minutes"}
    assert recorded_files(THIRD) == recorded_files(DEMO)
    assert read(THIRD, "training_record.json")["run"]["seconds"] <= 600


def test_the_documented_command_is_the_recipe_that_was_run():
    assert documented_commands()["THIRD"] == recorded_recipe(THIRD)


def test_no_weights_are_committed():
    assert not list(THIRD.glob("*.safetensors"))
    others = [path for path in THIRD.iterdir() if path != recording_file()]
    assert sum(path.stat().st_size for path in others) < 200_000


def test_its_recorded_quality_is_near_the_demo_s():
    measured, demo = read(THIRD, "measurements.json"), read(DEMO, "measurements.json")
    assert measured["held_out"].keys() == demo["held_out"].keys()
    for name, loss in measured["held_out"].items():
        assert loss["n_tokens"] == demo["held_out"][name]["n_tokens"]
        assert loss["nats_per_token"] <= demo["held_out"][name]["nats_per_token"] + 0.25
    assert measured["minimal_pairs"]["accuracy"] >= 0.8


def test_no_router_collapsed(routing):
    """Every layer spreads its tokens as if over 48 of its 64 experts or more, and uses them all."""
    use = np.array(routing["expert_use"])
    assert use.shape == (N_LAYERS, N_EXPERTS)
    assert use.sum(1) == pytest.approx(TOP_K, abs=0.01)
    shares = use / use.sum(1, keepdims=True)
    effective = np.exp(-(shares * np.log(shares)).sum(1))
    assert effective.min() >= 48
    assert use.min() >= 0.01


def test_its_card_is_what_its_records_give(tmp_path):
    for name in RECORDS:
        shutil.copy(THIRD / name, tmp_path)
    write_card(tmp_path)
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert written == (THIRD / "README.md").read_text(encoding="utf-8")


def test_the_recording_is_small_and_of_this_model(trace):
    assert recording_file().stat().st_size <= 3e6
    shape = recorded_recipe(THIRD).architecture
    spec = trace.spec
    assert (spec.model_id, spec.family) == ("third_model", shape.family)
    assert (spec.n_layers, spec.n_experts, spec.top_k) == (N_LAYERS, N_EXPERTS, TOP_K)
    assert (spec.hidden_size, trace.recorded_under) == (shape.hidden_size, "ungated")


def test_the_recording_has_two_windows_of_every_domain(trace):
    assert trace.labels == tuple(np.repeat(DEMO_DOMAINS, WINDOWS_PER_DOMAIN))
    assert trace.n_tokens == len(trace.labels) * WINDOW
    np.testing.assert_array_equal(trace.sequence_starts, np.arange(0, trace.n_tokens, WINDOW))
    assert trace.token_ids.min() >= 0
    assert trace.token_ids.max() < recorded_recipe(THIRD).architecture.vocabulary_size


def test_the_recording_is_what_a_router_gives(trace):
    """Distinct experts in descending order of weights that sum to one, as float16 rounds them."""
    experts = np.sort(trace.expert_indices, axis=2)
    assert (np.diff(experts, axis=2) > 0).all()
    assert (np.diff(trace.weights, axis=2) <= 0).all()
    assert trace.weights.min() > 0
    np.testing.assert_allclose(trace.weights.sum(axis=2), 1, atol=2e-3)


def test_the_recorded_routing_is_the_one_that_was_measured(trace, routing):
    """On all held-out text, of which the recording is a part: a use and a locality like there."""
    measured = np.array(routing["expert_use"])
    recorded = expert_use(trace.expert_indices, N_EXPERTS)
    likeness = [np.corrcoef(*rows)[0, 1] for rows in zip(measured, recorded, strict=True)]
    assert min(likeness) > 0.6
    assert np.mean(likeness) > 0.8
    recorded_locality = locality(trace.expert_indices, trace.sequence_starts)
    np.testing.assert_allclose(recorded_locality, routing["locality"], atol=0.06)
    assert (recorded_locality > routing["locality_by_chance"]).all()
