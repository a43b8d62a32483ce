"""What version 0.1 saved loads, and gives the numbers that version computed from it."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.transfer.clock import VirtualClock
from adapmoe_lab.evaluation.loss import evaluate_loss
from adapmoe_lab.records import (
    HardwareProfile,
    Predictors,
    RoutingTrace,
    SensitivityProfile,
    Surrogates,
    TunedConfig,
)
from adapmoe_lab.records.step_costs import HostCosts, StepCosts
from adapmoe_lab.simulation.simulate import simulate

FIXTURE = Path(__file__).parents[1] / "fixtures" / "saved_by_0_1"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())


@pytest.fixture
def saved(tmp_path):
    """Return a copy of the folder, so that nothing is ever written beside the originals.

    That version told models apart by a part of their weights, which later ones may warn of.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*by a part of their weights")
        yield Path(shutil.copytree(FIXTURE, tmp_path / "saved"))


@pytest.fixture
def load_model(saved):
    """Return a loader of the fixture's model as it was loaded then."""

    def load_it(**arguments):
        plain = {"device": "cpu", "link": "none", "announce": lambda _: None}
        return load(saved / "model", **{**plain, **arguments})

    return load_it


def losses(model):
    """Return the loss of each text in nats, under the model's own configuration."""
    return evaluate_loss(model, model.config, EXPECTED["texts"]).nats


def test_everything_saved_then_is_itself(saved):
    config = TunedConfig.load(saved / "config.json")
    found = {
        "model": config.model["fingerprint"],
        "trace": RoutingTrace.load(saved / "trace.npz").fingerprint(),
        "surrogates": Surrogates.load(saved / "surrogates.safetensors").fingerprint(),
        "predictors": Predictors.load(saved / "predictors.safetensors").fingerprint(),
        "prefetch": config.prefetch.fingerprint(),
        "gating": config.gating.fingerprint(),
    }
    assert found == EXPECTED["fingerprints"]
    assert config.compensation.fingerprint() == found["surrogates"]
    assert config.prefetch.fitted.fingerprint() == found["predictors"]


def test_hardware_times_are_those_measured_then(saved):
    hardware = HardwareProfile.load(saved / "hardware.json")
    assert hardware.to_json() == TunedConfig.load(saved / "config.json").hardware.to_json()
    n_bytes = 9216
    assert hardware.load_s(n_bytes) == pytest.approx(EXPECTED["hardware"]["load_s"], rel=1e-12)
    assert hardware.dense_layer_s(3, is_gated=True) == pytest.approx(
        EXPECTED["hardware"]["dense_layer_s"], rel=1e-12
    )


def test_the_loss_predicted_then(saved):
    sensitivity = SensitivityProfile.load(saved / "sensitivity.npz")
    assert sensitivity.total_increase([0.8] * 3) == pytest.approx(EXPECTED["increase_at_0.8"])


def test_the_simulation_of_then(saved):
    config = TunedConfig.load(saved / "config.json")
    simulation = simulate(
        RoutingTrace.load(saved / "trace.npz"),
        config,
        HardwareProfile.load(saved / "hardware.json"),
        sensitivity=SensitivityProfile.load(saved / "sensitivity_with_surrogates.npz"),
    )
    for name, value in EXPECTED["simulation"].items():
        np.testing.assert_allclose(getattr(simulation, name), value, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("eviction", EXPECTED["simulation_by_eviction"])
def test_what_each_eviction_loaded_then(saved, eviction):
    config = replace(TunedConfig.load(saved / "config.json"), eviction=eviction)
    hardware = HardwareProfile.load(saved / "hardware.json")
    trace = RoutingTrace.load(saved / "trace.npz")
    loads = simulate(trace, config, hardware).loads_per_token
    wanted = EXPECTED["simulation_by_eviction"][eviction]
    np.testing.assert_allclose(loads, wanted, rtol=5e-3)


def test_the_text_and_the_losses_of_then(saved, load_model):
    plain = load_model()
    assert plain.generate("Once upon a time", 16) == EXPECTED["generated"]
    np.testing.assert_allclose(losses(plain), EXPECTED["ungated_loss_nats"], rtol=1e-5)
    tuned = load_model(config=saved / "config.json")
    np.testing.assert_allclose(losses(tuned), EXPECTED["loss_nats"], rtol=1e-5)


@pytest.mark.parametrize("kind", ["int4", "mixed"])
def test_prepared_stores_of_then(saved, load_model, kind):
    model = load_model(store=saved / f"store_{kind}")
    np.testing.assert_allclose(losses(model), EXPECTED[f"{kind}_loss_nats"], rtol=1e-5)


def test_the_mixed_config_runs_from_its_store(saved, load_model):
    unknown = "saved for experts in several precisions, not known which"
    with pytest.warns(UserWarning, match=unknown) as warned:
        model = load_model(config=saved / "config_mixed.json", store=saved / "store_mixed")
    found = [warning.filename for warning in warned if unknown in str(warning.message)]
    assert found == [__file__]
    measured = losses(model)  # the config in force is not warned of again
    assert model.config.plan.n_slots == 6
    np.testing.assert_allclose(measured, EXPECTED["mixed_loss_nats"], rtol=1e-5)


def test_the_traffic_of_then(saved, load_model):
    config = TunedConfig.load(saved / "config.json")
    model = load_model(config=config, clock=VirtualClock())
    model.engine.step_costs = StepCosts(
        HostCosts(dense_layer_s=1e-3), expert_s=1e-4, load_s=lambda n: n / 1e7
    )
    model.apply(config)
    model.generate("Once upon a time", 24)
    assert model.engine.traffic.to_json() == EXPECTED["traffic"]
