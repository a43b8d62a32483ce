"""A load that is stopped leaves nothing behind: no files, no swapped classes, no open files."""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from adapmoe_lab.engine.loading import load
from adapmoe_lab.models.checkpoint.expert_reader import ExpertReader

IDS = torch.arange(1, 30)[None]


@pytest.mark.parametrize("stop_at", [1, 2, 7, 12])
@pytest.mark.parametrize("with_store", [False, True])
@torch.no_grad()
def test_stopped_between_experts(tiny_checkpoint, tmp_path, monkeypatch, stop_at, with_store):
    build, read, left = MixtralExperts.__init__, ExpertReader.read, stop_at

    def stopping(self, *args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return read(self, *args, **kwargs)

    store = tmp_path / "experts" if with_store else None
    with monkeypatch.context() as patch:
        patch.setattr(ExpertReader, "read", stopping)
        with pytest.raises(KeyboardInterrupt):
            load(tiny_checkpoint, dtype="float32", device="cpu", link="none", store=store)
    gc.collect()  # a file left open would warn, and warnings are errors
    assert MixtralExperts.__init__ is build
    assert list(tmp_path.iterdir()) == []
    expected = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)(IDS).logits
    again = load(tiny_checkpoint, dtype="float32", device="cpu", link="none", store=store)
    torch.testing.assert_close(again.hf(IDS).logits, expected, rtol=0, atol=1e-5)


def test_stopped_while_the_rest_is_loaded(tiny_checkpoint, monkeypatch):
    build = MixtralExperts.__init__

    def stopping(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.MixtralForCausalLM.from_pretrained", stopping)
        with pytest.raises(KeyboardInterrupt):
            load(tiny_checkpoint, device="cpu", link="none")
    assert MixtralExperts.__init__ is build
