"""A model that runs some of its layers several times for each token is served, not profiled."""

import pytest
import torch
import transformers
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import adapmoe_lab as lab
from adapmoe_lab.cli.doctor import Machine, fits
from adapmoe_lab.engine.loading import known_targets, link_target
from adapmoe_lab.engine.transfer.clock import VirtualClock
from adapmoe_lab.models.checkpoint.checkpoint import look_at_model
from adapmoe_lab.models.checkpoint.footprint import kv_cache_bytes
from adapmoe_lab.models.support import UnsupportedModelError, causal_families
from adapmoe_lab.profiling.routing.recorder import RoutingRecorder
from adapmoe_lab.profiling.sensitivity.sensitivity import sensitivity
from adapmoe_lab.records.step_costs import HostCosts, StepCosts

FAMILY = "inkling2_loop_text"
N_RUNS = 8
"""Of its four layers the second and third are run three times each."""

TEXTS = ["One text of a few words.", "And another one, as long."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if FAMILY not in causal_families():
        pytest.skip(f"transformers {transformers.__version__} has no family that loops")
    return save_tiny(FAMILY, tmp_path_factory.mktemp("looped"))


@pytest.fixture(scope="module")
def model(folder):
    return lab.load(folder, dtype="float32", device="cpu", link="none")


@pytest.mark.parametrize(
    "profiled",
    [
        lambda model, project: lab.profile(model, TEXTS, project=project),
        lambda model, _: RoutingRecorder(model),
        lambda model, _: sensitivity(model, TEXTS),
        lambda model, _: lab.fit_surrogates(model, TEXTS, rank=2),
        lambda model, _: lab.fit_predictors(model, TEXTS),
        lambda model, _: lab.probe_hardware(model),
    ],
)
def test_what_takes_one_run_of_every_layer_is_refused(profiled, model, tmp_path):
    expected = (
        r"runs 2 of its 4 layers with experts \(from layer 1 to 2\) 3 times .* served, but not"
    )
    with pytest.raises(UnsupportedModelError, match=expected):
        profiled(model, tmp_path)


@torch.no_grad()
def test_the_cache_of_keys_and_values_has_room_for_every_run(folder):
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cache = hf(torch.arange(1, 11)[None], use_cache=True).cache
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert len(cache.layers) == N_RUNS
    assert kv_cache_bytes(hf.config, 10, 4) >= kept


def test_the_doctor_counts_loads_of_every_run(folder):
    machine = Machine("a GPU", 2**40, 2**40, 1e9)
    fit = fits(look_at_model(folder), machine)[0]
    assert fit.most_s_per_token == pytest.approx(2 * N_RUNS * fit.expert_bytes / 1e9)


def test_an_emulated_link_is_held_against_one_run_of_a_layer(folder):
    target = link_target(known_targets()[0], torch.device("cpu"))
    model = lab.load(folder, dtype="float32", device="cpu", link="none", clock=VirtualClock())
    model.engine.step_costs = StepCosts(HostCosts(dense_layer_s=1e-3), expert_s=1e-4)
    model.emulate_link(target)
    one_layer_s = 1e-3 + 2 * 1e-4
    load_s = model.spec.stored_expert_bytes / model.link.bytes_per_s
    assert load_s == pytest.approx(target.load_ratio * one_layer_s)
