"""The demo model that ships: what it is, what it is worth, and that the engine runs it exactly."""

import csv
import json
import subprocess
from dataclasses import replace

import pytest
import torch
from runs import decode
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapmoe_lab.assets import data_folder, demo_folder, text_folder
from adapmoe_lab.engine.loading import load
from adapmoe_lab.evaluation.harness import evaluate
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.records import TunedConfig

PROMPT = "Once upon a time, there was a little girl who"
MIB = 2**20


@pytest.fixture(scope="module")
def plain():
    return AutoModelForCausalLM.from_pretrained(demo_folder(), dtype=torch.float32)


@pytest.fixture(scope="module")
def model():
    return load("demo", dtype="float32", device="cpu", link="none")


def records():
    folder = demo_folder()
    return [
        json.loads((folder / f"{name}.json").read_text())
        for name in ("training_record", "measurements")
    ]


def test_it_is_the_model_that_was_promised(plain):
    config = plain.config
    assert config.model_type == "mixtral"
    shape = (config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok)
    assert shape == (8, 8, 2)
    assert 12e6 <= plain.num_parameters() <= 17e6
    assert config.vocab_size == len(AutoTokenizer.from_pretrained(demo_folder())) == 8192
    shards = list(demo_folder().glob("*.safetensors"))
    assert all(shard.stat().st_size < 16 * MIB for shard in shards)


def test_committed_files_stay_small():
    root = data_folder().parent
    if not (root / ".git").exists():
        pytest.skip("not a git checkout: there are no committed files to weigh")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True)
    names = [name for name in listed.stdout.decode().split("\0") if name]
    total = sum((root / name).stat().st_size for name in names if (root / name).exists())
    assert total < 45e6


def test_its_record_says_how_it_was_trained():
    training, _ = records()
    assert training["run"]["hardware"]
    assert training["run"]["n_tokens"] == training["run"]["n_steps"] * 64 * 512
    read = [file["path"] for domain in training["domains"].values() for file in domain["files"]]
    assert "gsm8k/train.jsonl.gz" in read
    assert not [path for path in read if "test" in path or "blimp" in path]
    with (demo_folder() / "loss_curve.csv").open() as file:
        curve = list(csv.DictReader(file))
    assert len(curve) >= 10
    assert float(curve[-1]["development_loss"]) < float(curve[0]["development_loss"])


def test_its_recorded_quality_meets_the_targets():
    _, measured = records()
    loss = {name: entry["nats_per_token"] for name, entry in measured["held_out"].items()}
    assert measured["mean_nats_per_token"] <= 3.5
    assert max(loss["books_children_en"], loss["books_fiction_en"]) <= 3.9
    assert loss["python_stdlib"] <= 2.9
    assert loss["novels_de"] <= 4.7
    assert measured["routing"]["smallest_expert_use"] >= 0.02
    assert len(measured["routing"]["next_router_recall"]) == 8
    assert measured["minimal_pairs"]["accuracy"] >= 0.65


def test_it_writes_english():
    model = load("demo", device="cpu", link="none", dtype="float32")
    text = model.generate("Once upon a time, there was a little", max_new_tokens=30)
    words = text.split()
    assert len(words) > 15
    assert sum(word.strip('.,"!?').isalpha() for word in words) > 0.8 * len(words)


@pytest.mark.parametrize("slots", range(1, 9))
@torch.no_grad()
def test_engine_equals_the_unmodified_model_at_every_cache_size(plain, model, slots):
    model.apply(replace(TunedConfig.untuned(model.spec), plan=slots_plan(model.spec, slots)))
    ids = model.encode(PROMPT)
    assert (model.hf(ids[None]).logits - plain(ids[None]).logits).abs().max() <= 1e-5
    assert decode(model.hf, ids, 24) == decode(plain, ids, 24)


def test_it_knows_some_grammar(model):
    """lm-eval on every 5th shipped pair; the card has the score of all."""
    scores = evaluate(model, tasks=["minimal_pairs"], limit=300)
    assert scores["minimal_pairs"]["acc"] >= 0.65


@pytest.mark.slow
def test_recorded_scores_are_reproduced(model):
    _, measured = records()
    scores = evaluate(model, tasks=["minimal_pairs"])
    assert scores["minimal_pairs"]["acc"] == pytest.approx(
        measured["minimal_pairs"]["accuracy"], abs=0.02
    )


@pytest.mark.slow
@pytest.mark.skipif(text_folder() is None, reason="needs $ADAPMOE_LAB_DATA, a folder of real text")
def test_recorded_loss_is_reproduced():
    from adapmoe_lab.demo.corpus import read_corpus
    from adapmoe_lab.demo.measurements import measure_held_out
    from adapmoe_lab.models.demo_architecture import load_checkpoint

    hf, tokenizer = load_checkpoint(demo_folder(), dtype=torch.float32)
    losses, routing = measure_held_out(
        hf, tokenizer.backend_tokenizer, read_corpus(text_folder()), max_tokens=8192
    )
    _, measured = records()
    for name, loss in losses.items():
        recorded = measured["held_out"][name]
        error = (loss.standard_error**2 + recorded["standard_error"] ** 2) ** 0.5
        assert loss.nats_per_token == pytest.approx(recorded["nats_per_token"], abs=4 * error)
    assert routing.expert_use.min() >= 0.02


@pytest.mark.slow
@pytest.mark.skipif(text_folder() is None, reason="needs $ADAPMOE_LAB_DATA, a folder of real text")
def test_blimp_is_reported_where_the_text_is(model):
    scores = evaluate(model, tasks=["blimp"], limit=400)
    assert 0.5 < scores["blimp"]["acc"] < 1
