"""The key-value cache, whatever the installed transformers calls it."""

from types import SimpleNamespace

import pytest
import torch
from checkpoints import save_tiny_mixtral
from tiny_models import RECIPES, VOCABULARY_SIZE, save_tiny
from torch import nn
from transformers import AutoModelForCausalLM

from adapmoe_lab.models.hooks.key_value_cache import (
    cache_given,
    forward_cached,
    static_cache,
)
from adapmoe_lab.models.support import UnsupportedModelError

IDS = torch.arange(1, 40)[None]


class TakesPastKeyValues(nn.Module):
    """Answers as a model of transformers 5.17 to 5.23 does."""

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        assert use_cache
        kept = [*(past_key_values or []), *input_ids.flatten().tolist()]
        return Output(logits=input_ids, past_key_values=kept)


class TakesCache(nn.Module):
    """Answers as a model of transformers 5.24 does, which takes the other name no longer."""

    def forward(self, input_ids, cache=None, use_cache=None):
        assert use_cache
        return Output(logits=input_ids, cache=[*(cache or []), *input_ids.flatten().tolist()])


class Output(dict):
    """Has its entries as attributes too, as the outputs of transformers do."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("kind", [TakesPastKeyValues, TakesCache])
def test_a_cache_is_passed_on_by_either_name(kind):
    hf, cache = kind(), None
    for part in IDS.split(13, dim=1):
        logits, cache = forward_cached(hf, part, cache)
        assert torch.equal(logits, part)
    assert cache == IDS[0].tolist()


@torch.no_grad()
def test_steps_with_a_cache_give_the_logits_of_the_whole_text(tmp_path, capfd):
    hf = AutoModelForCausalLM.from_pretrained(save_tiny_mixtral(tmp_path)).eval()
    expected, cache, found = hf(IDS, use_cache=False).logits, None, []
    capfd.readouterr()
    for part in IDS.split([20, 1, 1, 17], dim=1):
        logits, cache = forward_cached(hf, part, cache)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected)
    assert cache.get_seq_length() == IDS.shape[1]
    last, _ = forward_cached(hf, IDS, logits_to_keep=1)
    torch.testing.assert_close(last, expected[:, -1:])
    assert "deprecated" not in capfd.readouterr().err


def test_a_cache_is_found_among_what_a_forward_was_given():
    held = SimpleNamespace()
    assert cache_given({"input_ids": IDS}) is None
    assert cache_given({"cache": held}) is held
    assert cache_given({"past_key_values": held}) is held


KEPT_OTHERWISE = {
    "cohere2_moe": {"sliding_window": 8},
    "deepseek_v32": {"index_n_heads": 16},
    "inkling_text": {"sliding_window_size": 8},
    "lfm2_moe": {},
    "qwen3_next": {},
}
"""Families with sliding windows, indexers, windows beside convolutions, convolutions and states."""


@pytest.mark.parametrize("family", KEPT_OTHERWISE)
@torch.no_grad()
def test_a_static_cache_gives_the_logits_of_the_whole_text_and_can_be_rewound(
    family, tmp_path, monkeypatch
):
    monkeypatch.setitem(RECIPES, family, {**RECIPES[family], **KEPT_OTHERWISE[family]})
    folder = save_tiny(family, tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(1, VOCABULARY_SIZE, (1, 24), generator=torch.Generator().manual_seed(0))
    expected = hf(ids, use_cache=False).logits
    cache = static_cache(hf, 32)
    for _ in range(2):
        logits, _ = forward_cached(hf, ids[:, :12], cache)
        torch.testing.assert_close(logits, expected[:, :12], rtol=1e-4, atol=1e-4)
        with cache.marked():
            for token in (3, 4, 5):
                forward_cached(hf, torch.tensor([[token]]), cache)
            cache.rewind(12)
        for place in range(12, 24):
            logits, _ = forward_cached(hf, ids[:, place : place + 1], cache)
            torch.testing.assert_close(logits[:, 0], expected[:, place], rtol=1e-4, atol=1e-4)
        cache.reset()


@pytest.mark.parametrize("family", ["cohere2_moe", "lfm2_moe", "qwen3_next"])
@torch.no_grad()
def test_a_static_cache_keeps_its_tensors_where_they_are(family, tmp_path):
    hf = AutoModelForCausalLM.from_pretrained(save_tiny(family, tmp_path)).eval()
    cache = static_cache(hf, 48)

    def places():
        kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
        states = [state for state, _ in cache._marked]
        return [tensor.data_ptr() for tensor in (*kept, *states) if tensor is not None]

    found = []
    for part in IDS.split([20, 1, 1, 17], dim=1):
        forward_cached(hf, part, cache)
        with cache.marked():
            found.append(places())
    assert found[0]
    assert all(each == found[0] for each in found)


def test_what_has_no_static_cache_is_refused_by_name(tmp_path):
    hf = AutoModelForCausalLM.from_pretrained(save_tiny("deepseek_v4", tmp_path)).eval()
    with pytest.raises(UnsupportedModelError, match=r"of deepseek_v4, .*executor='host'"):
        static_cache(hf, 16)
