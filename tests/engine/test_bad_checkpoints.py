"""Checkpoints and arguments that cannot work are refused before anything is loaded."""

import json

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import LlamaConfig, LlamaForCausalLM

from adapmoe_lab.engine.device import choose_device
from adapmoe_lab.engine.loading import load
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.models.support import UnsupportedModelError
from adapmoe_lab.records import RecordError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return save_tiny("qwen3_moe", tmp_path / "model")


def refused(folder, error, match, **arguments):
    with pytest.raises(error, match=match):
        load(folder, device="cpu", link="none", **arguments)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def test_a_missing_shard(folder):
    gone = shards(folder)[1]
    gone.unlink()
    refused(folder, CheckpointError, gone.name)


def test_a_shard_cut_short(folder):
    short = shards(folder)[1]
    short.write_bytes(short.read_bytes()[:-100])
    refused(folder, CheckpointError, rf"{short.name}.* bytes")


def test_an_index_that_names_an_absent_tensor(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.1.mlp.experts.99.up_proj.weight"] = shards(folder)[0].name
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, CheckpointError, r"experts\.99\.up_proj.*does not hold")


def test_an_expert_that_is_nowhere(folder):
    drop(folder, "model.layers.2.mlp.experts.3.up_proj.weight")
    refused(folder, CheckpointError, r"no whole gate_up_proj for expert 3 of model\.layers\.2")


def test_another_weight_that_is_nowhere(folder):
    drop(folder, "model.layers.2.self_attn.q_proj.weight")
    refused(folder, CheckpointError, r"lacks 1 weights that qwen3_moe needs, such as .*q_proj")


def drop(folder, name):
    index = json.loads((folder / INDEX).read_text())
    file = folder / index["weight_map"].pop(name)
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))


def test_a_file_that_is_not_safetensors(folder):
    shards(folder)[0].write_bytes(b"\x80\x04" + b"pickle" * 100)
    refused(folder, CheckpointError, "not a safetensors file")


def test_pickles_are_never_read(folder):
    for file in [*shards(folder), folder / INDEX]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(folder, CheckpointError, r"pytorch_model\.bin is a pickle, which is never read")


def test_an_unknown_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "newmoe"}))
    refused(folder, UnsupportedModelError, "a newmoe model, which transformers .* does not know")


def test_code_that_comes_with_a_model_is_not_run(folder):
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    text = json.dumps({**config, "model_type": "own", "auto_map": own})
    (folder / "config.json").write_text(text)
    refused(folder, UnsupportedModelError, "code of its own, which is never run here")


def test_a_dense_model(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    refused(tmp_path, UnsupportedModelError, "This llama model has no Mixture-of-Experts layer")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"dtype": "int8"}, "dtype='int8' is unknown; expected 'auto', bfloat16"),
        ({"expert_dtype": "fp7"}, "'fp7' is not a precision"),
        ({"expert_memory": "1KiB"}, "slots cannot give 3 layers|slots cannot give 2 layers"),
        ({"expert_memory": "lots"}, "'lots' is not a size"),
        ({"max_context_tokens": 0}, "must be a whole number of at least 1, got 0"),
        ({"revision": "main"}, "revision='main' chooses a version of a hub model"),
    ],
)
def test_wrong_arguments(folder, arguments, expected):
    refused(folder, ValueError, expected, **arguments)


@pytest.mark.parametrize("device", ["auto", "cuda:0,cuda:1", ["cuda:0", "cuda:1"]])
def test_several_devices(device):
    with pytest.raises(ValueError, match="asks for several devices; one model runs on one"):
        choose_device(device)


def test_a_config_of_a_model_of_another_depth(folder, load_tiny):
    other = load_tiny(expert_memory="60%").config
    refused(folder, RecordError, "was tuned for .*3 layers x 4 experts.*2 layers x 8", config=other)


@pytest.mark.parametrize("expert_dtype", ["auto", "int4"])
@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("moe_intermediate_size", 24, r"down_proj of .* as \(64, 48\), .* makes it \(64, 24\)"),
        ("moe_intermediate_size", 96, r"down_proj of .* as \(64, 48\), .* makes it \(64, 96\)"),
        ("num_local_experts", 6, r"gate\.weight as|of more experts than the 6"),
        ("num_local_experts", 9, r"no gate_up_proj for expert 8"),
        ("vocab_size", 11, r"embed_tokens\.weight as|lm_head\.weight as"),
    ],
)
def test_a_config_of_another_size(folder, expert_dtype, field, value, expected):
    config = json.loads((folder / "config.json").read_text())
    assert field in config
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    refused(folder, CheckpointError, expected, expert_dtype=expert_dtype)
