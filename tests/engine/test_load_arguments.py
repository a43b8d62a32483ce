"""Arguments of `load` in the forms people pass them: understood, or refused before any work."""

from pathlib import PurePosixPath

import numpy as np
import pytest
import torch

from adapmoe_lab.engine import device
from adapmoe_lab.engine.device import choose_device
from adapmoe_lab.engine.loading import load

NOWHERE = "nobody/no-such-model"


@pytest.mark.parametrize(
    ("form", "plain"),
    [
        ({"expert_memory": np.int64(200_000)}, {"expert_memory": 200_000}),
        ({"expert_memory": 200_000.0}, {"expert_memory": 200_000}),
        ({"expert_memory": "200000"}, {"expert_memory": 200_000}),
        ({"host_memory": np.float64(1e9)}, {"host_memory": 10**9}),
        ({"device": torch.device("cpu")}, {"device": "cpu"}),
        ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
        ({"dtype": "torch.float16"}, {"dtype": "float16"}),
        ({"expert_dtype": torch.float16}, {"expert_dtype": "float16"}),
        ({"expert_dtype": [[torch.bfloat16] * 4] * 3}, {"expert_dtype": [["bfloat16"] * 4] * 3}),
        ({"expert_dtype": np.full((3, 4), "int4")}, {"expert_dtype": "int4"}),
        ({"max_context_tokens": np.int32(64)}, {"max_context_tokens": 64}),
        ({"batch_size": np.int64(2)}, {"batch_size": 2}),
    ],
)
def test_a_form_means_the_plain_one(load_tiny, form, plain):
    found, expected = load_tiny(**form), load_tiny(**plain)
    assert found.spec == expected.spec
    assert found.hf.dtype == expected.hf.dtype
    assert str(found.memory.slots.slots) == str(expected.memory.slots.slots)
    assert found.memory.needs == expected.memory.needs


def test_paths_of_any_kind(tiny_checkpoint, load_tiny, tmp_path):
    class Named:
        def __fspath__(self):
            return str(tiny_checkpoint)

    options = {"link": "none", "device": "cpu", "announce": lambda _: None}
    config = load_tiny().config.save(tmp_path / "tuned.json")
    for name in (Named(), PurePosixPath(tiny_checkpoint), str(tiny_checkpoint)):
        assert load(name, config=PurePosixPath(config), **options).config.plan is not None
    load(tiny_checkpoint, store=PurePosixPath(tmp_path / "store"), **options)
    assert (tmp_path / "store").is_dir()


def test_a_config_in_the_home_folder(load_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    load_tiny(expert_memory="50%").config.save(tmp_path / "tuned.json")
    assert load_tiny(config="~/tuned.json").config.plan is not None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"expert_memory": float("inf")}, r"expert_memory=inf is not a size: give bytes, or text"),
        ({"expert_memory": 0.5}, r"expert_memory=0\.5 is less than a byte; .* such as '50%'"),
        ({"expert_memory": -1}, r"expert_memory=-1 is not a size"),
        ({"expert_memory": True}, r"expert_memory=True is not a size"),
        ({"host_memory": float("nan")}, r"host_memory=nan is not a size"),
        ({"host_memory": 0.25}, r"host_memory=0\.25 is less than a byte; .* such as '25%'"),
        ({"device": 0}, r"device=0 is not supported; expected 'cpu', 'cuda' or 'cuda:N'"),
        ({"device": "CPU"}, r"device='CPU' is not supported"),
        ({"device": torch.device("meta")}, r"device=device\(type='meta'\) is not supported"),
        ({"dtype": 16}, r"dtype must be the name of a precision, .* got 16 \(int\)"),
        ({"dtype": None}, r"dtype must be the name of a precision, .* got None"),
        ({"expert_dtype": 4}, r"expert_dtype must be the name of a precision, .* got 4 \(int\)"),
        ({"expert_dtype": ["int4", "int8"]}, r"in place of a layer's list it has 'int4' \(str\)"),
        ({"expert_dtype": [[4, 8]]}, r"expert_dtype\[0\] must be the name of a precision"),
        ({"max_context_tokens": "4096"}, r"max_context_tokens must be a whole number of at least"),
        ({"max_context_tokens": float("inf")}, r"max_context_tokens must be a whole number"),
        ({"max_context_tokens": -1}, r"max_context_tokens must be .* at least 1, got -1"),
        ({"batch_size": 1.5}, r"batch_size must be a whole number of at least 1, got 1\.5"),
        ({"batch_size": True}, r"batch_size must be a whole number of at least 1, got True"),
        ({"batch_size": None}, r"batch_size must be a whole number of at least 1, got None"),
        ({"link": 5}, r"link must be text or None, got 5 \(int\)"),
        ({"link": ["none"]}, r"link must be text or None, got \['none'\] \(list\)"),
        ({"revision": 3}, r"revision must be text or None, got 3 \(int\)"),
        ({"store": 3}, r"store must be the path of a folder, got 3 \(int\)"),
        ({"config": {"plan": 3}}, r"config must be a TunedConfig or the path of one, got \{'plan'"),
        ({"announce": None}, r"announce must be a function of a text, such as print"),
    ],
)
def test_what_is_not_understood_is_refused_before_the_model_is_looked_for(arguments, expected):
    with pytest.raises(ValueError, match=expected) as refusal:
        load(NOWHERE, **{"device": "cpu", **arguments})
    assert "min_slots" not in str(refusal.value)
    assert "several devices" not in str(refusal.value)


@pytest.mark.parametrize("name", [None, 3, b"demo", ["demo"]])
def test_what_names_no_model_is_refused(name):
    with pytest.raises(ValueError, match="name must be 'demo', a folder or a hub id, got"):
        load(name)


def test_a_budget_too_small_says_what_load_takes(load_tiny):
    with pytest.raises(ValueError, match=r"raise the budget by \d+ experts .* included\)\.$"):
        load_tiny(expert_memory=1)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device.torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == choose_device(torch.device("cuda", 1))
    with pytest.raises(ValueError, match="torch sees 2 CUDA devices, 'cuda:0' to 'cuda:1'"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["balanced", {"": 0}, ("cuda:0", "cuda:1")])
def test_a_spread_over_devices_is_refused_as_one(name):
    with pytest.raises(ValueError, match="asks for several devices; one model runs on one"):
        choose_device(name)
