"""What a model holds is given back: by `close`, by a block's end, and when nothing refers to it."""

import gc
import threading
import weakref

import psutil
import pytest
import torch
from runs import PROMPT, decode, half_cached

from adapmoe_lab.records import TunedConfig


def test_a_closed_model_runs_nothing_and_says_so(load_tiny):
    with load_tiny() as model:
        text = model.generate(PROMPT, 4)
        assert text.startswith(PROMPT)
    closed = r"This model is closed, its experts are freed; load it again\."
    for use in (
        lambda: model.generate(PROMPT, 4),
        lambda: model.hf(input_ids=torch.tensor([[1, 2]])),
        lambda: model.apply(TunedConfig.untuned(model.spec)),
        lambda: model.save_experts("never-written"),
        model.detach,
    ):
        with pytest.raises(RuntimeError, match=closed):
            use()
    model.close()


@pytest.mark.parametrize("arguments", [{}, {"store": "prepared"}])
def test_closing_gives_back_experts_and_slots(load_tiny, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    model = half_cached(load_tiny(**arguments))
    decode(model.hf, model.encode(PROMPT), 2)
    parts = [model.store.buffer(0, 0).untyped_storage(), *model.engine._cached._slots]
    held = [weakref.ref(part) for part in parts]
    del parts
    gc.collect()
    assert all(part() is not None for part in held)
    model.close()
    gc.collect()
    assert all(part() is None for part in held)


def test_closing_closes_the_files_that_experts_are_read_from(load_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPMOE_LAB_CACHE", str(tmp_path))

    def open_shards():
        return [file.path for file in psutil.Process().open_files() if "safetensors" in file.path]

    before = open_shards()
    with load_tiny(host_memory="70%") as model:
        decode(model.hf, model.encode(PROMPT), 2)
        assert len(open_shards()) > len(before)
    assert open_shards() == before


def test_a_model_that_nothing_refers_to_is_gone(load_tiny):
    threads = threading.active_count()
    model = half_cached(load_tiny())
    decode(model.hf, model.encode(PROMPT), 2)
    gone = [weakref.ref(part) for part in (model, model.hf, model.engine, model.store)]
    del model
    gc.collect()
    assert [part() for part in gone] == [None] * 4
    assert threading.active_count() == threads


def test_a_detached_model_stays_whole(load_tiny):
    expected = load_tiny().generate(PROMPT, 4)
    model = load_tiny()
    hf = model.detach()
    model.close()
    ids = model.encode(PROMPT)
    assert model.tokenizer.decode([*ids.tolist(), *decode(hf, ids, 4)]).startswith(expected[:-1])
    with pytest.raises(RuntimeError, match="load it again"):
        model.apply(model.config)
