"""Recorded routing of held-out text, against what the unmodified model routes."""

import gzip
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapmoe_lab.demo.corpus import read_corpus
from adapmoe_lab.demo.recording import main, record_routing
from adapmoe_lab.demo.tokens import train_tokenizer
from adapmoe_lab.models.demo_architecture import (
    END_OF_TEXT,
    DemoArchitecture,
    build_model,
    save_checkpoint,
    wrap_tokenizer,
)
from adapmoe_lab.records import RoutingTrace

SHAPE = DemoArchitecture(
    family="qwen3_moe",
    n_layers=3,
    n_experts=12,
    top_k=4,
    hidden_size=32,
    intermediate_size=16,
    vocabulary_size=300,
)
WORDS = {"sea": "ship sail wave storm", "farm": "cow barn field plough"}


def stories(words, numbers):
    return [" ".join(f"The {word} saw {n} more." for word in words.split() * 3) for n in numbers]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return a text folder of two domains; the held-out stories tell other numbers."""
    folder = tmp_path_factory.mktemp("text")
    for name, words in WORDS.items():
        (folder / name).mkdir()
        for file, numbers in (("train", range(40)), ("valid", range(100, 140))):
            with gzip.open(folder / name / f"{file}.jsonl.gz", "wt", encoding="utf-8") as stream:
                stream.writelines(
                    f"{json.dumps({'text': story})}\n" for story in stories(words, numbers)
                )
    return folder


@pytest.fixture(scope="module")
def checkpoint(text, tmp_path_factory):
    """Return the folder of an untrained model whose routers prefer some experts clearly."""
    folder = tmp_path_factory.mktemp("checkpoints") / "toy"
    tokenizer = train_tokenizer(read_corpus(text), SHAPE.vocabulary_size)
    torch.manual_seed(0)
    model = build_model(SHAPE, tokenizer.token_to_id(END_OF_TEXT))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.normal_(0, 0.5)
    save_checkpoint(model, folder, max_shard_size="15MB")
    wrap_tokenizer(tokenizer, SHAPE.max_positions).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trace(text, checkpoint, tmp_path_factory):
    """Return what the command wrote."""
    path = tmp_path_factory.mktemp("recordings") / "routing.npz"
    arguments = [checkpoint, "--text", text, "--out", path, "--device", "cpu", "--windows", "3"]
    assert main([str(argument) for argument in arguments]) == 0
    return RoutingTrace.load(path)


def sequences(trace):
    ends = [*trace.sequence_starts[1:], trace.n_tokens]
    return [slice(start, end) for start, end in zip(trace.sequence_starts, ends, strict=True)]


@torch.no_grad()
def test_it_holds_what_the_unmodified_model_s_routers_gave(trace, checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    given = []
    for layer in plain.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: given.append(output[1:]))
    assert trace.expert_indices.shape == trace.weights.shape == (trace.n_tokens, 3, 4)
    for tokens in sequences(trace):
        given.clear()
        plain(torch.from_numpy(trace.token_ids[tokens].astype(np.int64))[None])
        weights, experts = (torch.stack(parts, 1).numpy() for parts in zip(*given, strict=True))
        np.testing.assert_array_equal(trace.expert_indices[tokens], experts)
        np.testing.assert_allclose(trace.weights[tokens], weights, rtol=2**-11, atol=1e-5)


def test_its_sequences_are_windows_of_each_domain_s_held_out_text(trace, checkpoint, text):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    domains = {domain.name: domain for domain in read_corpus(text)}
    assert trace.labels == ("farm",) * 3 + ("sea",) * 3
    assert trace.n_tokens == 6 * 512
    for label, tokens in zip(trace.labels, sequences(trace), strict=True):
        stories = tokenizer.decode(trace.token_ids[tokens]).split(END_OF_TEXT)
        assert len(stories) > 1
        for story in stories:
            assert any(story in whole for whole in domains[label].held_out)
        for whole in stories[1:-1]:
            assert whole not in domains[label].training


def test_it_says_what_was_recorded_and_keeps_no_more(trace):
    assert trace.spec.model_id == "toy"
    assert (trace.spec.family, trace.recorded_under) == ("qwen3_moe", "ungated")
    assert trace.router_probs is None
    assert not trace.predictions
    assert not trace.is_decode.any()
    np.testing.assert_array_equal(np.unique(trace.step_ids), range(6))


def test_a_short_text_is_one_shorter_window(checkpoint, tmp_path):
    (tmp_path / "sea").mkdir()
    for file in ("train", "valid"):
        with gzip.open(tmp_path / "sea" / f"{file}.txt.gz", "wt", encoding="utf-8") as stream:
            stream.write(f"The ship of the {file} file saw land.")
    trace = record_routing(checkpoint, read_corpus(tmp_path), device="cpu")
    assert trace.labels == ("sea",)
    assert 8 < trace.n_tokens < 40


def test_what_cannot_be_recorded_is_refused(checkpoint, text, tmp_path):
    with pytest.raises(ValueError, match="windows must be a whole number of at least 1, got 0"):
        record_routing(checkpoint, read_corpus(text), 0, device="cpu")
    (tmp_path / "sea").mkdir()
    with gzip.open(tmp_path / "sea" / "train.txt.gz", "wt", encoding="utf-8") as stream:
        stream.write("One document, of which nothing is held out.")
    with pytest.raises(ValueError, match=r"no domain has held-out text to record; add valid\.\*"):
        record_routing(checkpoint, read_corpus(tmp_path), device="cpu")
