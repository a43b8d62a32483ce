"""Experts narrower than the hidden states: served exactly and measured, but not profiled."""

from __future__ import annotations

import pytest
import torch
from checkpoints import byte_tokenizer
from tiny_models import VOCABULARY_SIZE, spread_weights, tiny_config
from transformers import AutoModelForCausalLM

from adapmoe_lab.engine.loading import load
from adapmoe_lab.models.support import UnsupportedModelError
from adapmoe_lab.profiling.hardware.probe import probe_hardware
from adapmoe_lab.profiling.routing.profile import profile

LATENT_SIZE = 32
IDS = torch.randint(1, VOCABULARY_SIZE, (1, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent")
    config = tiny_config("nemotron_h")
    config.moe_latent_size = LATENT_SIZE
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    spread_weights(hf, torch.Generator().manual_seed(0))
    hf.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, dtype="float32", device="cpu", link="none")


@torch.no_grad()
def test_it_is_served_as_the_unmodified_model_runs(model, folder):
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(model.hf(IDS).logits, plain(IDS).logits, rtol=0, atol=2e-5)


def test_the_width_of_an_expert_is_that_of_its_own_parameters(model):
    assert model.spec.hidden_size == LATENT_SIZE < model.hf.config.hidden_size


def test_the_machine_is_probed_without_predictors(model):
    profile = probe_hardware(model, n_steps=4, rounds=1)
    assert (profile.copy_s > 0).all()
    assert profile.predict_s is None


def test_its_routing_cannot_be_recorded_and_that_is_told_at_once(model, tmp_path):
    done = []
    with pytest.raises(UnsupportedModelError, match="can be served, but not profiled"):
        profile(model, ["Once upon a time"], project=tmp_path, progress=lambda *a: done.append(a))
    assert not done
