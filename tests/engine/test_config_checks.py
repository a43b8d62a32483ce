"""A config is checked when it is brought, and what was in force before comes back unasked."""

import shutil
import warnings
from pathlib import Path

import pytest

from adapmoe_lab.engine.loading import load
from adapmoe_lab.records import PartialIdentityWarning, TunedConfig

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
