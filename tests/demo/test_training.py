"""Training a demo model of each family: a few steps on a CPU, from text to a checkpoint."""

import csv
import gzip
import json
from dataclasses import replace

import pytest
import torch
from runs import decode
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from adapmoe_lab.demo.train import main
from adapmoe_lab.engine.loading import load
from adapmoe_lab.models.demo_architecture import (
    FAMILIES,
    DemoArchitecture,
    build_model,
    load_checkpoint,
    residual_dropout,
    routing_taps,
)
from adapmoe_lab.policies.allocation.slots import slots_plan
from adapmoe_lab.records import TunedConfig

SHAPE = {
    "n_layers": 2,
    "n_experts": 8,
    "top_k": 3,
    "hidden_size": 32,
    "intermediate_size": 16,
    "vocabulary_size": 300,
}
SHARED_FIELDS = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
}
BY_HAND = {
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SHARED_FIELDS, intermediate_size=16, num_local_experts=8)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SHARED_FIELDS,
            moe_intermediate_size=16,
            num_experts=8,
            norm_topk_prob=True,
            head_dim=4,
        )
    ),
}
"""Each family as its own transformers classes make it."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return a text folder of two domains that differ in their words."""
    folder = tmp_path_factory.mktemp("text")
    for name, words in (("sea", "ship sail wave storm"), ("farm", "cow barn field plough")):
        (folder / name).mkdir()
        stories = [
            " ".join(f"The {word} saw {number} more." for word in words.split() * 4)
            for number in range(60)
        ]
        with gzip.open(folder / name / "train.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.writelines(f"{json.dumps({'text': story})}\n" for story in stories)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, text, tmp_path_factory):
    """Return (family, folder) of a model trained for two passes over the text."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    options = {
        **SHAPE,
        "family": request.param,
        "text": text,
        "out": folder,
        "epochs": 2,
        "sequence_length": 32,
        "batch_sequences": 8,
        "n_evaluations": 4,
        "device": "cpu",
    }
    arguments = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
    assert main([part for pair in arguments for part in pair]) == 0
    return request.param, folder


def small(family):
    torch.manual_seed(0)
    return build_model(DemoArchitecture(family=family, **SHAPE), end_of_text_id=0)


def test_the_checkpoint_is_of_its_family(trained):
    family, folder = trained
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert type(plain) is type(BY_HAND[family]())
    assert plain.dtype == torch.bfloat16
    assert {"mlp.gate.weight" in name for name in plain.state_dict()} == {True, False}
    assert sum("mlp.gate.weight" in name for name in plain.state_dict()) == 2


def test_it_learns(trained):
    with (trained[1] / "loss_curve.csv").open() as file:
        losses = [float(row["development_loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.5


def test_the_record_and_the_card_name_the_family(trained):
    family, folder = trained
    record = json.loads((folder / "training_record.json").read_text())
    assert record["architecture"] == {
        **SHAPE, "family": family, "n_heads": 8, "n_key_value_heads": 4, "max_positions": 1024,
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    assert f"A {FAMILIES[family].title} of 0.0M parameters: 2 layers, 8 experts, top-3" in card


@pytest.mark.parametrize("slots", [1, 3, 8])
@torch.no_grad()
def test_the_engine_equals_plain_transformers(trained, slots):
    _, folder = trained
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = load(folder, dtype="float32", device="cpu", link="none")
    model.apply(replace(TunedConfig.untuned(model.spec), plan=slots_plan(model.spec, slots)))
    ids = model.encode("The cow saw 7 more. The storm")
    assert (model.hf(ids[None]).logits - plain(ids[None]).logits).abs().max() <= 1e-5
    assert decode(model.hf, ids, 12) == decode(plain, ids, 12)


@torch.no_grad()
def test_kept_weights_sum_to_one(trained):
    """Both families renormalise over the chosen experts; Qwen3's configuration must say so."""
    model, _ = load_checkpoint(trained[1], dtype=torch.float32)
    for layer in model.model.layers:
        _, weights, chosen = layer.mlp.gate(torch.randn(5, 32))
        assert weights.shape == chosen.shape == (5, 3)
        torch.testing.assert_close(weights.sum(1), torch.ones(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_weights_are_those_of_the_family_s_own_class(family):
    ours = small(family).state_dict()
    torch.manual_seed(0)
    theirs = BY_HAND[family]().state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_taps_hear_what_every_router_is_given_and_says(family):
    model = small(family)
    with routing_taps(model) as taps:
        model(torch.arange(10)[None])
    assert list(taps.inputs) == list(taps.logits) == [0, 1]
    for index, layer in enumerate(model.model.layers):
        expected = functional.linear(taps.inputs[index][0], layer.mlp.gate.weight)
        torch.testing.assert_close(taps.logits[index], expected)
    heard = taps.logits[0]
    model(torch.arange(10, 20)[None])
    assert taps.logits[0] is heard


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_dropout_acts_in_training_only_and_leaves_nothing_behind(family):
    model, ids = small(family), torch.arange(10)[None]
    exact = model.eval()(ids).logits
    with residual_dropout(model, 0.5):
        assert torch.equal(model(ids).logits, exact)
        assert not torch.allclose(model.train()(ids).logits, exact)
    assert torch.equal(model(ids).logits, exact)


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [
        ({"family": "dbrx"}, "family must be one of mixtral, qwen3_moe, got 'dbrx'"),
        ({"top_k": 9}, r"top_k must lie in 1\.\.8, got 9"),
        ({"hidden_size": 100}, "hidden_size 100 does not split into 8 heads of an even width"),
    ],
)
def test_an_architecture_that_cannot_be_is_refused(dimensions, message):
    with pytest.raises(ValueError, match=message):
        DemoArchitecture(**dimensions)


def test_an_unknown_family_is_refused_on_the_command_line(text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--text", str(text), "--out", str(tmp_path / "model"), "--family", "dbrx"])
    assert "invalid choice: 'dbrx'" in capsys.readouterr().err
