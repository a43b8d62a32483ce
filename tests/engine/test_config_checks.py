"""A config is checked when it is brought, and what was in force before comes back unasked."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from adapmoe_lab.engine.loading import load
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.records import PartialIdentityWarning, RoutingTrace, TunedConfig
from adapmoe_lab.simulation.simulate import simulate

SAVED = Path(__file__).parents[1] / "fixtures" / "saved_by_0_1"


@pytest.fixture
def model(tmp_path):
    """Return a model under a config of version 0.1, of which loading warns."""
    saved = shutil.copytree(SAVED, tmp_path / "saved")
    options = {"device": "cpu", "link": "none", "announce": lambda _: None}
    with pytest.warns(PartialIdentityWarning) as warned:
        model = load(saved / "model", config=saved / "config.json", **options)
    assert [str(warning.message)[:11] for warning in warned] == ["This config"]
    assert {warning.filename for warning in warned} == {__file__}
    return model


def test_what_was_in_force_comes_back_without_a_warning(model):
    before = model.config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.running(TunedConfig.untuned(model.spec)):
            model.predictors()  # which lets go of the fitted ones
        with model.running(), model.running(before):
            pass
    assert model.config is before


def test_what_is_applied_is_warned_of(model):
    with pytest.warns(PartialIdentityWarning) as warned:
        model.apply(model.config)
    assert str(warned[0].message).startswith("This config was tuned for")
    assert {warning.filename for warning in warned} == {__file__}


def test_a_block_that_closes_the_model_ends_as_any_other(model):
    with model.running():
        model.close()
    with pytest.raises(RuntimeError, match="This model is closed"), model.running():
        pass


def test_the_old_step_costs_stay_where_a_config_cannot_be_put_in_force(model, monkeypatch):
    def no_room(*_):
        raise MemoryError

    before, costs = model.config, model.engine.step_costs
    assert costs.host.dense_layer_s > 0
    monkeypatch.setattr(model.engine, "configure", no_room)
    with pytest.raises(MemoryError):
        model.apply(TunedConfig.untuned(model.spec))
    assert (model.config, model.engine.step_costs) == (before, costs)


@pytest.mark.parametrize(
    ("eviction", "message"),
    [
        ("oldest", "eviction='oldest' is unknown; expected one of lru, lfu"),
        ("belady", "'belady' reads what comes later, as only a simulation"),
        ("static", "'static' keeps the pinned experts of a plan, and this plan pins none"),
    ],
)
def test_an_eviction_that_no_run_can_follow_is_refused_wherever_a_config_is_brought(
    model, tmp_path, eviction, message
):
    before = model.config
    config = replace(TunedConfig.untuned(model.spec), eviction=eviction)
    path = config.save(tmp_path / "tuned.json")
    with pytest.raises(ValueError, match=message):
        model.apply(config)
    with pytest.raises(ValueError, match=message), model.running(config):
        pytest.fail("the config was put in force")
    assert model.config is before
    for source in (config, path):  # before the model is even looked for
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "no model", config=source)


def test_a_simulation_knows_the_future_but_no_policy_that_is_not():
    trace = RoutingTrace.load(SAVED / "trace.npz")
    config = replace(TunedConfig.untuned(trace.spec), plan=slots_plan(trace.spec, 3))
    lru, belady = (
        simulate(trace, replace(config, eviction=name)).loads_per_token.sum()
        for name in ("lru", "belady")
    )
    assert belady < lru
    with pytest.raises(ValueError, match="eviction='oldest' is unknown; expected one of lru, lfu"):
        simulate(trace, replace(config, eviction="oldest"))
