"""The key-value cache, whatever the installed transformers calls it."""

from types import SimpleNamespace

import pytest
import torch
from checkpoints import save_tiny_mixtral
from torch import nn
from transformers import AutoModelForCausalLM

from adapmoe_lab.models.hooks.key_value_cache import cache_given, forward_cached

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
