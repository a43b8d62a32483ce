"""Experts of several precisions: each counts its own bytes, and no layout passes for another."""

from dataclasses import replace

import pytest
import torch
from runs import PROMPT, decode

from adapmoe_lab.engine.loading import load
from adapmoe_lab.engine.transfer.clock import VirtualClock
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.profiling.routing.profile import profile
from adapmoe_lab.profiling.routing.recorder import RoutingRecorder
from adapmoe_lab.records import HardwareProfile, PrecisionPlan, TunedConfig
from adapmoe_lab.simulation.simulate import simulate

LAYOUT = [["float32", "int8", "int4", "int2"]] * 3
TURNED = [layer[::-1] for layer in LAYOUT]
IDS = torch.arange(1, 60)[None]


@pytest.fixture
def load_mixed(load_tiny):
    def load_it(layout=LAYOUT, **arguments):
        options = {"dtype": "float32", "announce": lambda _: None, "expert_dtype": layout}
        return load_tiny(**{**options, **arguments})

    return load_it


def config_for(model, n_slots=2):
    untuned = TunedConfig.untuned(model.spec)
    return replace(untuned, plan=slots_plan(model.spec, n_slots), precision=model.spec.precision)


@pytest.mark.parametrize("n_slots", [0, 1, 2])
def test_predicted_bytes_are_those_that_cross_the_link(load_mixed, n_slots):
    model = load_mixed(clock=VirtualClock())
    assert model.spec.all_experts_bytes == model.store.n_bytes
    config, recorder = config_for(model, n_slots), RoutingRecorder(model)
    with model.running(config), recorder.recording():
        decode(model.hf, model.encode(PROMPT)[:1], 40)
        moved = model.engine.traffic.bytes_moved
    hardware = HardwareProfile("cpu", "pcie", [1000], [1e-3], 1e-3, 1e-4)
    trace = recorder.trace()
    for known in (None, hardware):
        predicted = simulate(trace, config, known, warmup_tokens=0)
        assert predicted.bytes_per_token * trace.n_tokens == moved
    widest = predicted.loads_per_token.sum() * trace.n_tokens * model.spec.stored_expert_bytes
    assert moved < 0.9 * widest


def test_a_config_predicts_the_bytes_of_its_own_layout(load_mixed):
    model = load_mixed()
    recorder = RoutingRecorder(model)
    with recorder.recording():
        decode(model.hf, model.encode(PROMPT)[:1], 20)
    trace, config = recorder.trace(), config_for(model, 0)
    other = load_mixed(TURNED).spec.precision
    as_loaded, turned = simulate(trace, config), simulate(trace, replace(config, precision=other))
    assert as_loaded.bytes_per_token != turned.bytes_per_token
    assert simulate(trace, replace(config, precision=None)).bytes_per_token == (
        as_loaded.bytes_per_token
    )


def test_a_config_of_another_layout_is_refused(load_mixed):
    config = config_for(load_mixed())
    other = load_mixed(TURNED)
    expected = (
        "stores experts as 3 x float32, 3 x int2, 3 x int4, 3 x int8, the model is loaded as 3 x "
        "float32, 3 x int2, 3 x int4, 3 x int8: 12 of 12 experts differ. Load it with "
        r"expert_dtype=config\.precision\.names, or tune it as it is"
    )
    with pytest.raises(ValueError, match=expected):
        other.apply(config)
    one_more = [["int8", *LAYOUT[0][1:]], *LAYOUT[1:]]
    with pytest.raises(ValueError, match="1 of 12 experts differ"):
        load_mixed(one_more).apply(config)
    with pytest.raises(ValueError, match="is loaded as int4: 9 of 12 experts differ"):
        load_mixed("int4", config=config)
    int8, in_int4 = load_mixed("int8"), PrecisionPlan.uniform("int4", (3, 4))
    with pytest.raises(ValueError, match=r"12 of 12 .* Load it with expert_dtype='int4', or tune"):
        int8.apply(replace(config, precision=in_int4))


@torch.no_grad()
def test_a_saved_config_loads_the_layout_it_was_tuned_for(load_mixed, tmp_path):
    model = load_mixed()
    path = config_for(model).save(tmp_path / "tuned.json")
    again = load_mixed("auto", config=path)
    assert again.spec.precision == model.spec.precision
    assert torch.equal(again.hf(IDS).logits, model.hf(IDS).logits)


def test_a_prepared_store_of_another_layout_is_refused(load_mixed, tmp_path):
    model = load_mixed(store=tmp_path / "experts")
    config = replace(config_for(model), precision=load_mixed(TURNED).spec.precision)
    with pytest.raises(ValueError, match=r"name a new folder \(12 experts differ\)"):
        load_mixed("auto", config=config, store=tmp_path / "experts")


def test_a_config_of_a_model_of_another_shape_is_told_so(load_mixed):
    config = config_for(load_mixed())
    with pytest.raises(ValueError, match=r"was tuned for .*; 'demo' "):
        load("demo", config=config, device="cpu", link="none", announce=lambda _: None)


def test_a_config_whose_layout_is_not_known_runs_on_any_with_a_warning(load_mixed):
    model = load_mixed()
    unknown = replace(config_for(model), precision=PrecisionPlan(None))
    expected = "several precisions, not known which; it runs on those that are loaded, 3 x float32"
    with pytest.warns(UserWarning, match=expected):
        model.apply(unknown)
    with pytest.raises(ValueError, match="Load it with one precision per expert, or from the prep"):
        load_mixed("auto", config=unknown)


def test_a_trace_is_reused_for_its_own_layout_and_dtype_only(load_mixed, texts, tmp_path, capsys):
    def recorded(model):
        profile(model, texts[:1], project=tmp_path)
        return "Recorded" in capsys.readouterr().out

    assert recorded(load_mixed())
    assert not recorded(load_mixed())
    assert recorded(load_mixed(TURNED))
    assert recorded(load_mixed("bfloat16"))
    assert recorded(load_mixed("bfloat16", dtype="bfloat16"))
