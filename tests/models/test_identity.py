"""A model is known by every tensor of its files, and nothing kept for another is given to it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import save_tiny_mixtral
from safetensors.torch import load_file, save_file

from adapmoe_lab.engine.loading import load
from adapmoe_lab.models.checkpoint.checkpoint import open_checkpoint
from adapmoe_lab.models.checkpoint.identity import weights_identity
from adapmoe_lab.models.checkpoint.shard_file import CheckpointError
from adapmoe_lab.models.checkpoint.shards import read_index
from adapmoe_lab.profiling.routing.profile import profile
from adapmoe_lab.records import (
    GatingTable,
    PartialIdentityWarning,
    Predictors,
    PrefetchSource,
    PrefetchTable,
    RecordError,
    Surrogates,
    TunedConfig,
)

SAVED = Path(__file__).parent.parent / "fixtures" / "saved_by_0_1"
EXPERT = "model.layers.1.mlp.experts.2.w1.weight"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ADAPMOE_LAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def edited(folder: Path, name: str | None = None) -> str:
    """Change one number of one expert, as an edit or a merge would, and return its name."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = name or next(key for key in tensors if ".experts." in key)
    tensors[name][..., 0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    return name


def load_plainly(folder, **arguments):
    return load(folder, **{"link": "none", "device": "cpu", **arguments})


def test_one_number_of_one_expert_makes_another_model(checkpoint):
    before = weights_identity(read_index(checkpoint))
    edited(checkpoint)
    assert weights_identity(read_index(checkpoint)) != before


def test_the_same_tensors_are_the_same_model_however_they_lie_in_files(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, sharded / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    identities = {weights_identity(read_index(folder)) for folder in (checkpoint, sharded)}
    assert len(identities) == 1


def test_another_dtype_or_shape_of_the_same_bytes_is_another_model(tmp_path):
    values = torch.arange(8, dtype=torch.int16)
    found = set()
    for number, tensor in enumerate(
        (values, values.view(torch.bfloat16), values.reshape(2, 4), values + 1)
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({"w": tensor}, folder / "model.safetensors")
        found.add(weights_identity(read_index(folder)))
    assert len(found) == 4


def test_a_second_look_reads_no_tensor(checkpoint, monkeypatch):
    first = weights_identity(read_index(checkpoint))

    def forbidden(*_):
        raise AssertionError("a tensor was read again")

    monkeypatch.setattr(os, "pread", forbidden)
    assert weights_identity(read_index(checkpoint)) == first


def test_what_was_kept_is_not_believed_of_a_file_written_since(checkpoint):
    first = weights_identity(read_index(checkpoint))
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert weights_identity(read_index(checkpoint)) != first


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"state": 3}'])
def test_a_damaged_cache_is_read_past(checkpoint, tmp_path, content):
    first = weights_identity(read_index(checkpoint))
    (kept,) = (tmp_path / "cache" / "tensor-digests").iterdir()
    kept.write_bytes(content)
    assert weights_identity(read_index(checkpoint)) == first


def test_a_cache_folder_that_cannot_be_written_costs_time_only(checkpoint, tmp_path, monkeypatch):
    first = weights_identity(read_index(checkpoint))
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADAPMOE_LAB_CACHE", str(tmp_path / "file" / "cache"))
    assert weights_identity(read_index(checkpoint)) == first


def test_a_file_cut_short_meanwhile_is_named(checkpoint):
    index = read_index(checkpoint)
    os.truncate(checkpoint / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was cut short"):
        weights_identity(index)


def test_an_edited_expert_gets_no_store_config_or_trace_of_the_original(checkpoint, tmp_path):
    model = load_plainly(checkpoint, store=tmp_path / "store")
    config = TunedConfig.untuned(model.spec).save(tmp_path / "tuned.json")
    trace = profile(model, ["Once upon a time"], project=tmp_path / "project")
    edited(checkpoint)
    with pytest.raises(CheckpointError, match="was prepared from other weights"):
        load_plainly(checkpoint, store=tmp_path / "store")
    with pytest.raises(RecordError, match=r"tuned for .* Load the model it was tuned for"):
        load_plainly(checkpoint, config=config)
    other = load_plainly(checkpoint)
    assert other.spec.partial_revision == model.spec.partial_revision
    again = profile(other, ["Once upon a time"], project=tmp_path / "project")
    assert again.spec.fingerprint() != trace.spec.fingerprint()
    assert not np.array_equal(again.weights, trace.weights)


@pytest.mark.parametrize(
    ("field", "value", "is_another"),
    [
        ("rope_parameters", {"rope_theta": 5.0, "rope_type": "default"}, True),
        ("sliding_window", 3, True),
        ("rms_norm_eps", 0.1, True),
        ("transformers_version", "9.9", False),
        ("dtype", "float32", False),
        ("eos_token_id", [0, 1], False),
        ("sliding_window", None, False),
    ],
)
def test_the_same_weights_made_another_model_by_their_configuration(
    checkpoint, field, value, is_another
):
    before = open_checkpoint(checkpoint).identity()
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert (open_checkpoint(checkpoint).identity() != before) == is_another


def test_what_a_file_system_reads_piece_by_piece_is_no_damage(checkpoint, monkeypatch):
    first = weights_identity(read_index(checkpoint))
    shutil.rmtree(Path(os.environ["ADAPMOE_LAB_CACHE"]))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, n, at: pread(file, min(n, 100), at))
    assert weights_identity(read_index(checkpoint)) == first


def test_what_0_1_saved_says_that_it_knows_a_part_only(tmp_path):
    folder = shutil.copytree(SAVED, tmp_path / "saved")
    with pytest.warns(PartialIdentityWarning) as of_config:
        load_plainly(folder / "model", config=folder / "config.json")
    with pytest.warns(PartialIdentityWarning) as of_store:
        load_plainly(folder / "model", store=folder / "store_int4")
    texts = [str(warning.message) for warning in (*of_config, *of_store)]
    for made in ("This config was tuned", str(folder / "store_int4")):
        assert any(text.startswith(made) and "is not known" in text for text in texts)


def test_surrogates_and_predictors_of_0_1_run_with_what_is_known_of_the_model_now():
    model = load_plainly(SAVED / "model")
    surrogates = Surrogates.load(SAVED / "surrogates.safetensors")
    fitted = Predictors.load(SAVED / "predictors.safetensors")
    source = PrefetchSource("ridge", 1, np.full((3, 2), 0.5))
    config = replace(
        TunedConfig.untuned(model.spec),
        gating=GatingTable.per_layer([0.8] * 3, top_k=2),
        compensation=surrogates,
        prefetch=PrefetchTable([source], buffer_slots=2, fitted=fitted),
    )
    with pytest.warns(PartialIdentityWarning) as told:
        model.apply(config)
    starts = {str(warning.message)[:20] for warning in told}
    assert starts == {"The surrogates were ", "The predictors were "}
    assert model.generate("Once upon a time", 4)


def test_what_0_1_saved_of_another_model_is_refused(tmp_path):
    folder = shutil.copytree(SAVED, tmp_path / "saved")
    other = save_tiny_mixtral(tmp_path / "other", seed=1)
    with pytest.raises(RecordError, match="This config was tuned for"):
        load_plainly(other, config=folder / "config.json")
    with pytest.raises(CheckpointError, match="prepared from other weights"):
        load_plainly(other, store=folder / "store_int4")
